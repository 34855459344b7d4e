"""What a team's server withstands: docker/compose.yaml as processes; see tests/e2e/team.py for what differs.

Takes two to three minutes, one of them waiting for Prefect to notice that a run has gone silent.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest

from flows.client import Client
from tasks.store import Store
from tests.e2e.team import COMPOSE, MISSING, ROOT, Api, Team, kill, stop, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
# How long a silence means death, in place of ten minutes: two heartbeats.
SILENCE_S = 60


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

    state = wait_for("the end of the run", ended, 360)
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

    # Tripoise's own client finds its way: who signed the certificate, the password, the token.
    password = (team.secrets / "prefect_auth").read_text().strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_SSL_CERT_FILE", str(team.secrets / "tls_authority.crt"))
        with Client(team.url, password) as client:
            first, again = (client.trigger("store-gc", idempotency_key="once") for _ in range(2))
    assert first.id == again.id


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
