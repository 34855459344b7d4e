"""A real HTTP server on loopback that plays an OpenAI-compatible endpoint, and notes what it saw."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback:
    """A subclass says what it answers; open it as a context."""

    def __init__(self):
        self.requests, self.headers, self.most_at_once = [], [], 0
        self._now, self._seen, self._lock = 0, Counter(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._handle(self, body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def about(self, body):
        """What makes two requests the same; anything JSON-able."""
        return body

    def respond(self, body, before):
        """(status, headers, text) for a request that came ``before`` times before; may block."""
        raise NotImplementedError

    def _handle(self, handler, body):
        about = json.dumps(self.about(body), sort_keys=True)
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.requests.append(body)
            self.headers.append((handler.path, dict(handler.headers)))
            before = self._seen[about]
            self._seen[about] += 1
        try:
            status, headers, text = self.respond(body, before)
        finally:
            with self._lock:
                self._now -= 1
        data = text.encode()
        try:
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client gave up, as a test wants it to

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
