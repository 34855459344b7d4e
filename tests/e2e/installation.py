"""A whole installation of one machine for tests: `tripoise serve` with a password, in a folder of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

USER, PASSWORD = "tripoise", "not-a-secret"


@dataclass
class Served:
    """A running installation."""

    url: str
    folder: Path
    process: subprocess.Popen

    @property
    def api(self):
        return f"{self.url}/api"

    @property
    def store(self):
        return self.folder / "store"

    @property
    def log(self):
        return (self.folder / "serve.log").read_text()

    def call(self, verb, place, body=None, auth=(USER, PASSWORD)):
        for _ in range(20):  # 503: two writers met in SQLite; nothing was done
            answer = httpx.request(verb, f"{self.api}{place}", json=body, auth=auth, timeout=90, trust_env=False)
            if answer.status_code != 503:
                break
            time.sleep(0.3)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def wait(self, run, states=("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), seconds=240):
        """Poll a run until it is in one of the states; gives it as the API does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.call("GET", f"/flow_runs/{run}")
            if found["state_type"] in states:
                return found
            time.sleep(0.3)
        raise AssertionError(f"{found['name']} is {found['state_type']} after {seconds} s\n{self.log[-3000:]}")

    def stop(self):
        """Ask it to stop, as a terminal or a service manager does; gives its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def processes(self):
        """Command lines of the processes that belong to it, wherever they hang in the tree."""
        mark = f"PREFECT_HOME={self.folder / 'prefect'}".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
        # One that has ended, and whose end nobody has asked for yet, has no command line.
        return {number: line for number, line in found.items() if line}


def environment(folder):
    """Nothing of the user's own Prefect, nothing beyond this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TRIPOISE_"))}
    return kept | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{PASSWORD}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRIPOISE_TRACEBACK": "1",
    }


@contextmanager
def served(folder, *options):
    """Start ``tripoise serve`` and wait for its workers; end whatever is left of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "serve",
        "--port",
        str(port),
        "--store",
        str(folder / "store"),
        *options,
    ]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log, start_new_session=True)
    found = Served(f"http://127.0.0.1:{port}", folder, process)
    try:
        deadline = time.monotonic() + 240
        while not all(f"'{name}' started" in found.log for name in ("cpu", "gpu-0")):
            assert process.poll() is None, found.log[-3000:]
            assert time.monotonic() < deadline, found.log[-3000:]
            time.sleep(0.2)
        yield found
    finally:
        try:
            found.stop()
        finally:
            for number in found.processes():
                os.kill(number, signal.SIGKILL)
