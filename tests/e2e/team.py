"""docker/compose.yaml as processes on this machine: its settings, commands, secrets and proxy configuration, for real.

What differs: addresses and ports; Debian's PostgreSQL, Redis and nginx in place of images; processes in place of
containers, so that to kill a container means to kill a process and everything it started.
"""

import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from socket import socket

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path("none"))
MISSING = [
    str(program)
    for program in (POSTGRES / "postgres", "redis-server", "nginx", "openssl", "setpriv")
    if not shutil.which(program)
]
# The shortest that Prefect allows.
HEARTBEAT_S = 30


def wait_for(what, found, seconds=180):
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
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
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
