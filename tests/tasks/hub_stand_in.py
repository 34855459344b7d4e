"""A Hub on the loopback interface: real HTTP, as much of it as huggingface_hub asks for, and faults on demand.

The client's library reads its environment at import, so the client is a process of its own, kept alive between
questions: one JSON line in, one JSON line out.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_CLIENT = """
import json, sys
sys.stdout, answers = sys.stderr, sys.stdout
from pathlib import Path
from tasks.convert import convert
from tasks.publish import publish
from tasks.sources import resolve
from tasks.store import Store
for line in sys.stdin:
    ask = json.loads(line)
    try:
        if "out" in ask:
            convert(ask["source"], Path(ask["out"]))
            answer = {}
        elif "look" in ask:
            from tasks.watch.places import look
            answer = {"places": [[one.name, one.source, one.lacks()] for one in look(ask["source"])]}
        elif "model" in ask:
            store = Store(ask["store"])
            options = {name: ask.get(name) == "True" for name in ("replace", "public", "dry_run")}
            done = publish(store.lookup(ask["model"]), ask["source"], store, **options)
            answer = {"origin": done.origin, "reused": done.reused, "files": sorted(done.files)}
        else:
            store = Store(ask["store"])
            built = resolve(ask["source"], store)
            manifest = store.manifest(built.ref)
            answer = {"digest": built.ref.digest, "reused": built.reused, "files": sorted(manifest.files),
                      "location": manifest.location, "origin": manifest.details["origin"]}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Hub:
    """Repositories in memory, served on a free port until ``close``."""

    def __init__(self):
        self.branches = {}  # (repo, branch) -> commit
        self.commits = {}  # (repo, commit) -> {file: bytes}
        self.private = {}  # repo -> whether it was created private
        self.messages = {}  # commit -> message
        self.blobs = {}  # sha256 -> bytes, of large files that were uploaded
        self.gated = set()
        self.statuses = []  # answers to the next API requests, before the true one
        self.cut_after = {}  # file name -> bytes after which the connection breaks; later requests get 503
        self.requests = []  # (method, path)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, repo, folder, branch="main", **more):
        """Put the files of a folder on a branch; returns the commit."""
        return self.put(repo, {path.name: path.read_bytes() for path in sorted(folder.iterdir())} | more, branch)

    def put(self, repo, files, branch="main"):
        """Make these files the branch's content; returns the commit."""
        contents = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
        commit = hashlib.sha1(repr((repo, contents)).encode()).hexdigest()
        self.commits[repo, commit] = files
        self.branches[repo, branch] = commit
        return commit

    def downloads(self):
        """Names of the files whose content was asked for since the last call of ``forget``."""
        return [path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def forget(self):
        self.requests.clear()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class Client:
    """A process with its own environment that resolves and converts sources."""

    def __init__(self, url, home, **environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=kept | environment,
        )

    def ask(self, source, **question):
        self._process.stdin.write(json.dumps({"source": source} | {k: str(v) for k, v in question.items()}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def do_POST(self):
            data = self._sent()
            path = urlsplit(self.path).path
            hub.requests.append(("POST", path))
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if hub.statuses:
                return self._error(hub.statuses.pop(0), "")
            if parts[:2] == ["api", "validate-yaml"]:
                return self._json({"errors": [], "warnings": []})
            if parts[:3] == ["api", "repos", "create"]:
                asked = json.loads(data)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.private.setdefault(repo, asked.get("private", asked.get("visibility") == "private"))
                hub.put(repo, {".gitattributes": b""})  # as the Hub does
                return self._json({"url": f"{hub.url}/{repo}", "name": repo})
            if parts[-1] == "batch":
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}}
                    for one in json.loads(data)["objects"]
                    if one["oid"] not in hub.blobs
                ]
                return self._json({"transfer": "basic", "objects": objects})
            repo, what = "/".join(parts[2:4]), parts[4]
            if what == "preupload":
                return self._json(
                    {
                        "files": [
                            {
                                "path": one["path"],
                                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                                "shouldIgnore": False,
                                "oid": None,
                            }
                            for one in json.loads(data)["files"]
                        ]
                    }
                )
            files = dict(hub.commits.get((repo, hub.branches.get((repo, "main"))), {}))
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"])
                else:
                    message = value["summary"]
            commit = hub.put(repo, files)
            hub.messages[commit] = message
            return self._json({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})

        def _sent(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def do_PUT(self):
            data = self._sent()
            hub.requests.append(("PUT", self.path))
            hub.blobs[hashlib.sha256(data).hexdigest()] = data
            self._json({})

        def log_message(self, *_):
            pass

        def _answer(self, body):
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path))
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if parts[0] == "api":
                what, revision = (*parts[4:6], "main")[:2] if len(parts) > 4 else ("revision", "main")
                self._api("/".join(parts[2:4]), what, revision)
            else:
                self._file("/".join(parts[:2]), parts[3], parts[4], body)

        def _api(self, repo, what, revision):
            if hub.statuses:
                return self._error(hub.statuses.pop(0), "")
            if repo in hub.gated:
                return self._error(403, "GatedRepo")
            if not any(known == repo for known, _ in hub.commits):
                return self._error(404, "RepoNotFound")
            if what == "refs":
                refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                        for (known, name), commit in hub.branches.items() if known == repo]  # fmt: skip
                return self._json({"branches": refs, "tags": [], "converts": []})
            commit = hub.branches.get((repo, revision), revision)
            if (repo, commit) not in hub.commits:
                return self._error(404, "RevisionNotFound")
            files = hub.commits[repo, commit]
            if what == "revision":
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                return self._json({"id": repo, "sha": commit, "siblings": siblings})
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )

        def _file(self, repo, commit, name, body):
            commit = hub.branches.get((repo, commit), commit)
            data = hub.commits[repo, commit][name]
            if body and hub.cut_after.get(name) == 0:
                return self._error(503, "")
            start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if body and name in hub.cut_after:
                self.wfile.write(data[: hub.cut_after[name]])
                hub.cut_after[name] = 0
                self.close_connection = True
            elif body:
                self.wfile.write(data[start:])

        def _json(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _error(self, status, code):
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
