"""docker/compose.yaml as processes on this machine: its settings, commands, secrets and proxy configuration, for real.

What differs: addresses and ports; Debian's PostgreSQL, Redis and nginx in place of images; processes in place of
containers, so that to kill a container means to kill a process and everything it started. Takes about two minutes, half
of it waiting for Prefect to notice that a run has gone silent.
"""

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from socket import socket
from uuid import uuid4

import httpx
import psutil
import pytest
import yaml

from tasks.store import Store

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
BIN = Path(sys.executable).parent
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path("none"))
PROGRAMS = (POSTGRES / "postgres", "redis-server", "nginx", "openssl", "setpriv")
MISSING = [str(program) for program in PROGRAMS if not shutil.which(program)]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
# The shortest that Prefect allows; and how long a silence means death, in place of ten minutes.
HEARTBEAT_S, SILENCE_S = 30, 45


def wait_for(what, found, seconds=120):
    """Ask until the answer is not empty; gives the answer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := found():
                return answer
        except (httpx.HTTPError, OSError) as error:
            answer = error
        assert time.monotonic() < deadline, f"{seconds} s without {what}: {answer!r}"
        time.sleep(0.2)


def kill(process):
    """End a process and all it started at once, without a word, as the end of a container does."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        one.suspend()
    for one in tree:
        one.kill()
    process.wait(30)


def stop(process):
    """Ask a process to end; what does not is killed, and so is what it leaves behind."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(15)
    for one in below:
        if one.is_running():
            one.kill()


class Team:
    """The services of the compose file, by name."""

    def __init__(self, folder):
        self.folder, self.secrets, self.store = folder, folder / "secrets", folder / "store"
        self.ports = {
            name: self._free_port() for name in ("postgres", "redis", "proxy", "api-1", "api-2", "cpu-1", "cpu-2")
        }
        self.url = f"https://127.0.0.1:{self.ports['proxy']}/api"
        self.running = {}
        subprocess.run([DOCKER / "make-secrets", self.secrets, "127.0.0.1"], check=True)

    @staticmethod
    def _free_port():
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def environment(self, service, **more):
        """The settings of a service; its secrets lie in a folder, as files of their target names."""
        settings = COMPOSE["services"][service]["environment"]
        folder = self.folder / "mounted" / service
        if not folder.exists():
            folder.mkdir(parents=True)
            for one in COMPOSE["services"][service]["secrets"]:
                source, target = (one, one) if isinstance(one, str) else (one["source"], one["target"])
                text = (self.secrets / Path(COMPOSE["secrets"][source]["file"]).name).read_text()
                text = text.replace("redis:6379", f"127.0.0.1:{self.ports['redis']}")
                (folder / target).write_text(text)
        here = {
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
            "PREFECT_API_URL": self.url,
        }
        plain = {
            name: here.get(name, str(value).replace("/run/secrets", str(folder)))
            for name, value in settings.items()
            # No object store here: tests/tasks has one.
            if not name.startswith(("AWS_", "TRIPOISE_MIRROR"))
        }
        home = self.folder / "homes" / "-".join([service, *more.values()])
        home.mkdir(parents=True, exist_ok=True)
        return (
            plain
            | more
            | {
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "HOME": str(home),
                "PREFECT_HOME": str(home),
                "SECRETS_FOLDER": str(folder),
                "TRIPOISE_STORE": str(self.store),
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )

    def command(self, service):
        """The command of a service, with Prefect's secrets."""
        return self.with_secrets(COMPOSE["services"][service]["command"])

    def with_secrets(self, command):
        """A command of the image, whose working folder holds the scripts."""
        return [str(DOCKER / "with-secrets"), *(str(DOCKER / one) if one.endswith(".py") else one for one in command)]

    def start(self, name, command, environment=None):
        """Start a process with a log of its own."""
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.running[name] = process
        return process

    def wait_ready(self, name, url, **how):
        def ready():
            assert self.running[name].poll() is None, self.log(name)
            return httpx.get(url, timeout=5, **how).status_code == 200

        wait_for(f"{name} at {url}", ready)

    def start_postgres(self):
        home = self.folder / "postgres"
        home.mkdir()
        password = home / "password"
        password.write_text((self.secrets / "postgres_password").read_text())
        # It refuses to be root.
        become = []
        if os.geteuid() == 0:
            become = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            shutil.chown(home, "nobody", "nogroup")
            shutil.chown(password, "nobody", "nogroup")
        settings = COMPOSE["services"]["postgres"]["environment"]
        user, options = settings["POSTGRES_USER"], settings["POSTGRES_INITDB_ARGS"].split()
        subprocess.run(
            [*become, POSTGRES / "initdb", "-D", home / "data", "-U", user, f"--pwfile={password}", *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        port = str(self.ports["postgres"])
        listen = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={home}", "-c", "fsync=off"]
        self.start("postgres", [*become, POSTGRES / "postgres", "-D", home / "data", "-p", port, *listen])
        ask = [POSTGRES / "pg_isready", "-h", "127.0.0.1", "-p", port, "-U", user]
        wait_for("PostgreSQL", lambda: subprocess.run(ask, stdout=subprocess.DEVNULL).returncode == 0)
        self.ask_postgres("createdb", settings["POSTGRES_DB"])

    def ask_postgres(self, program, *arguments, **streams):
        """Run one of its programs; through its socket, as one within its container would."""
        user = COMPOSE["services"]["postgres"]["environment"]["POSTGRES_USER"]
        where = ["--host", self.folder / "postgres", "--port", str(self.ports["postgres"]), "--username", user]
        subprocess.run([POSTGRES / program, *where, *arguments], check=True, **streams)

    def start_redis(self):
        program, config, *options = COMPOSE["services"]["redis"]["command"]
        options[options.index("--dir") + 1] = str(self.folder)
        port = str(self.ports["redis"])
        here = ["--bind", "127.0.0.1", "--port", port]
        self.start("redis", [program, self.secrets / Path(config).name, *options, *here])
        ask = COMPOSE["services"]["redis"]["healthcheck"]["test"][1].replace("redis-cli", f"redis-cli -p {port}")
        wait_for("Redis", lambda: subprocess.run(["sh", "-c", ask]).returncode == 0)

    def start_api(self, name):
        command = self.command("api")
        command[command.index("--host") + 1] = "127.0.0.1"
        here = ["--port", str(self.ports[name])]
        self.start(name, [*command, *here], self.environment("api", NAME=name))

    def start_proxy(self):
        text = (DOCKER / "nginx.conf").read_text()
        replicas = "".join(f"server 127.0.0.1:{self.ports[name]} " + r"\1;" for name in ("api-1", "api-2"))
        for pattern, here in {
            r"resolver .*;": "",
            r"server api:4200 resolve (.*);": replicas,
            r"listen 8443 ssl;": f"listen 127.0.0.1:{self.ports['proxy']} ssl;",
            r"/run/secrets/": f"{self.secrets}/",
            r"/tmp/nginx": f"{self.folder}/nginx",
            r"pid ": "daemon off;\npid ",
        }.items():
            text, found = re.subn(pattern, here, text)
            assert found, f"nginx.conf has no {pattern}"
        config = self.folder / "nginx.conf"
        config.write_text(text)
        self.start("proxy", ["nginx", "-c", config])

    def start_worker(self, name):
        port = str(self.ports[name])
        worker = self.start(
            name,
            [*self.command("worker-cpu"), "--name", name],
            self.environment("worker-cpu", NAME=name, PREFECT_WORKER_WEBSERVER_PORT=port),
        )
        return worker

    def start_all(self):
        """In the order in which they depend on each other."""
        self.start_postgres()
        self.start_redis()
        subprocess.run(self.command("migrate"), env=self.environment("migrate"), check=True, stdout=subprocess.DEVNULL)
        self.start_api("api-1")
        self.start_api("api-2")
        self.start("services", self.command("services"), self.environment("services"))
        for name in ("api-1", "api-2"):
            self.wait_ready(name, f"http://127.0.0.1:{self.ports[name]}/api/ready")
        self.start_proxy()
        self.wait_ready("proxy", f"{self.url}/health", verify=self.trust())

    def trust(self):
        return ssl.create_default_context(cafile=self.secrets / "tls_authority.crt")


class Api:
    """The REST API behind the proxy, as a program of one's own would use it: password, then a token for writing."""

    def __init__(self, team):
        user, _, password = (team.secrets / "prefect_auth").read_text().partition(":")
        self.http = httpx.Client(base_url=team.url, verify=team.trust(), auth=(user, password), timeout=30)
        token = self.http.get("/csrf-token", params={"client": "test"}).raise_for_status().json()["token"]
        self.http.headers.update({"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token})

    def post(self, path, **body):
        return self.http.post(path, json=body).raise_for_status().json()

    def get(self, path):
        return self.http.get(path).raise_for_status().json()


@pytest.fixture(scope="module")
def team():
    # Not below pytest's own folder: PostgreSQL runs as a user who may not enter it.
    folder = Path(tempfile.mkdtemp(prefix="team-"))
    folder.chmod(0o755)
    team = Team(folder)
    try:
        team.start_all()
        yield team
    finally:
        for process in reversed(team.running.values()):
            stop(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def api(team):
    api = Api(team)
    yield api
    api.http.close()


def test_nothing_is_to_be_had_without_password_and_token(team, api):
    with httpx.Client(base_url=team.url, verify=team.trust()) as stranger:
        assert stranger.get("/health").status_code == 200
        for closed in ("/metrics", "/version", "/csrf-token?client=stranger", "/work_pools/tripoise-cpu"):
            assert stranger.get(closed).status_code == 401, closed
        assert stranger.post("/flow_runs/filter", json={}, headers=api.http.headers).status_code == 401
        stranger.auth = api.http.auth
        assert stranger.post("/flow_runs/filter", json={}).status_code == 403, "a password without a token"
        assert stranger.get("/metrics").text.startswith("# HELP")
    with pytest.raises(httpx.HTTPError):
        httpx.get(team.url.replace("https", "http") + "/health").raise_for_status()


def test_the_check_of_the_services_sees_whether_they_work(team, api):
    *check, _ = team.with_secrets(COMPOSE["services"]["services"]["healthcheck"]["test"][2:])
    environment, seconds = team.environment("services"), "3"

    def ask():
        return subprocess.run([*check, seconds], env=environment, capture_output=True, text=True)

    wait_for("services at work", lambda: ask().returncode == 0)
    os.kill(team.running["services"].pid, signal.SIGSTOP)
    try:
        event = {"occurred": "2026-01-01T00:00:00Z", "event": "test", "resource": {"prefect.resource.id": "test"}}
        api.http.post("/events", json=[event | {"id": str(uuid4())}]).raise_for_status()
        assert "event-persister" in wait_for("their silence", lambda: ask().stderr)
    finally:
        os.kill(team.running["services"].pid, signal.SIGCONT)
    wait_for("services at work again", lambda: ask().returncode == 0)


def deploy(team):
    """The service that does it, which here takes a run for dead sooner."""
    folder = shutil.copytree(ROOT / "deployments", team.folder / "deployments")
    automations = folder / "automations.yaml"
    text, found = re.subn(r"within: 600", f"within: {SILENCE_S}", automations.read_text())
    assert found == 1
    automations.write_text(text)
    subprocess.run(
        [*team.command("deploy"), "--from", folder],
        env=team.environment("deploy"),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def bench():
    def source(role):
        return f"mini3h://{role}?budget=smoke"

    return {
        "title": "A small comparison",
        "base": source("base"),
        "experts": [{"name": role, "source": source(role)} for role in ("helpful", "honest", "harmless")],
        "methods": [{"name": "linear"}, {"name": "task_arithmetic"}, {"name": "tsvm"}],
        "scales": [0.5, 1.0, 1.5],
        "limit": 8,
    }


def request_run(api):
    deployment = api.get("/deployments/name/benchmark/benchmark")["id"]
    return api.post(f"/deployments/{deployment}/create_flow_run", parameters={"bench": bench()})["id"]


def artifacts(team):
    """Every finished artifact, and the time at which its manifest was written."""
    found = team.store.glob("*/[!.]*/manifest.json")
    return {f"{path.parts[-3]}/{path.parts[-2][:12]}": path.stat().st_mtime_ns for path in found}


def num_merged(team):
    return sum(name.startswith("merged/") for name in artifacts(team))


def test_a_benchmark_outlives_a_replica_of_the_api_and_a_worker(team, api):
    deploy(team)
    for name in ("cpu-1", "cpu-2"):
        team.start_worker(name)
        team.wait_ready(name, f"http://127.0.0.1:{team.ports[name]}/health")
    run = request_run(api)

    wait_for("the first merge", lambda: num_merged(team) >= 1)
    kill(team.running["api-1"])
    wait_for("more merges with one replica", lambda: num_merged(team) >= 3)
    assert api.get(f"/flow_runs/{run}")["state"]["type"] == "RUNNING"

    [busy] = [name for name in ("cpu-1", "cpu-2") if psutil.Process(team.running[name].pid).children()]
    kill(team.running[busy])
    before = artifacts(team)
    started = time.monotonic()

    def ended():
        state = api.get(f"/flow_runs/{run}")["state"]
        return state if state["type"] in ("COMPLETED", "FAILED", "CANCELLED") else None

    state = wait_for("the end of the run", ended, 240)
    print(f"ended {time.monotonic() - started:.0f} s after its worker was killed")
    assert state["type"] == "COMPLETED", state
    history = [one["name"] for one in api.get(f"/flow_run_states/?flow_run_id={run}")]
    assert [name for name in history if name in ("Crashed", "AwaitingRetry", "Completed")] == [
        *("Crashed", "AwaitingRetry", "Completed")
    ]

    # Nothing twice: what was there stayed as it was, nobody made it again, and the rest was made by the other worker.
    after = artifacts(team)
    assert before.items() <= after.items()
    assert num_merged(team) == 1 + 3 + 3
    [other] = {"cpu-1", "cpu-2"} - {busy}
    times = Counter(re.findall(r": made (\S+) in", team.log(other)))
    assert not times.keys() & before.keys()
    assert times == Counter(after.keys() - before.keys())


def test_a_backup_brings_back_database_and_store(team, api):
    """The commands of docs/operations.md."""
    store, identity = Store(team.store), {"what": "kept"}
    store.build("data", identity, lambda folder: (folder / "rows").write_text("kept") and None)
    flow = api.post("/flows/", name="kept")["id"]
    dump, archive = team.folder / "prefect.dump", team.folder / "store.tar"
    with dump.open("wb") as file:
        team.ask_postgres("pg_dump", "--format=custom", "prefect", stdout=file)
    subprocess.run(
        ["tar", "--create", "--format=posix", "--file", archive, "--directory", team.folder, "store"], check=True
    )

    assert api.http.delete(f"/flows/{flow}").is_success
    shutil.rmtree(team.store)
    for name in ("api-1", "api-2", "services"):
        stop(team.running[name])
    team.ask_postgres("dropdb", "--force", "prefect")
    team.ask_postgres("createdb", "prefect")
    with dump.open("rb") as file:
        team.ask_postgres("pg_restore", "--exit-on-error", "--dbname=prefect", stdin=file)
    subprocess.run(["tar", "--extract", "--file", archive, "--directory", team.folder], check=True)

    team.start_api("api-1")
    team.wait_ready("api-1", f"http://127.0.0.1:{team.ports['api-1']}/api/ready")
    assert wait_for("the flow", lambda: api.get(f"/flows/{flow}"))["name"] == "kept"
    assert store.build("data", identity, lambda folder: pytest.fail("made again")).reused
