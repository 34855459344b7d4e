"""``reevaluate`` on a real server and worker: a schedule, missed runs, a published checkpoint, an alert; and its page.

The deployment is the one that docs/reevaluate.md shows, the alerts are those of deployments/. Takes one to two minutes.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from tasks.report.trend import TrendInputs, write_trend
from tests.tasks.watch.tiny import share, without, write_model, write_suite

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
DOCS = Path(__file__).parents[2] / "docs" / "reevaluate.md"
ENTRY = yaml.safe_load(re.search(r"```yaml\n(name: reevaluate\n.*?)```", DOCS.read_text(), re.DOTALL)[1])


def wait_for(what, found, seconds=180):
    """Ask until the answer is not empty; gives the answer."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{seconds} s without {what}"
        time.sleep(0.2)
    return answer


@contextmanager
def running(*arguments, environment):
    """``prefect`` with some arguments, in a process group of its own that ends with the context."""
    process = subprocess.Popen([sys.executable, "-m", "prefect", *arguments], env=environment, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def alerts():
    """Address of a webhook on loopback, and what it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


@pytest.fixture
def home():
    """For Prefect's database; in memory where that goes, as a busy disk makes SQLite slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield folder


@pytest.fixture
def environment(tmp_path, home, monkeypatch):
    """Of server, worker and this process; the server is up, and there is something to look at for half a minute."""
    write_suite(tmp_path / "suite")
    write_model(tmp_path / "models" / "step-1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {
        "PREFECT_HOME": home,
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "4",
        # For two minutes ahead: a hundred runs at once would keep a slow machine busy.
        "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "15",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "TRIPOISE_STORE": str(tmp_path / "store"),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with running("server", "start", "--host", "127.0.0.1", "--port", str(port), environment=dict(os.environ)):

        def healthy():
            try:
                return httpx.get(f"{ours['PREFECT_API_URL']}/health", timeout=5, trust_env=False).is_success
            except httpx.TransportError:
                return False

        wait_for("a server", healthy)
        yield dict(os.environ)


@pytest.fixture
def client(environment):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    # Prefect has read its settings when it was imported, perhaps by another test.
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def deployed(client, alerts, tmp_path):
    """The deployment of the docs, its automation and the alerts; due every eight seconds, looks below ``tmp_path``."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    from flows.deploying.apply import apply
    from flows.deploying.declared import SHIPPED, Deployment, read_declared

    watch = ENTRY["parameters"]["watch"] | {
        "suite": str(tmp_path / "suite" / "suite.yaml"),
        "sources": [{"name": "tuned", "source": str(tmp_path / "models")}],
        "settle_s": 30,
    }
    entry = ENTRY | {"parameters": {"watch": watch}, "schedules": [{"interval": 8, "slug": "often"}]}
    shipped = read_declared(SHIPPED, "local")
    declared = replace(shipped, deployments=[Deployment.model_validate(entry)], automations=[])
    assert "no alerts: the server has no notification block tripoise-alerts" in apply(declared, client)
    data = {"subject": "{{subject}}", "body": "{{body}}"}
    CustomWebhookNotificationBlock(name="hook", url=alerts[0], json_data=data).save("tripoise-alerts")
    assert "2 alerts by tripoise-alerts (Custom Webhook)" in apply(declared, client)
    assert len(client.read_automations()) == 3
    return client.read_deployment_by_name("reevaluate/reevaluate")


def runs_of(client, deployment, **more):
    from prefect.client.schemas.filters import FlowRunFilter

    return client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id={"any_": [deployment.id]}, **more))


def due(client, deployment):
    """Runs that should have started and wait."""
    before = {"before_": datetime.now(UTC)}
    return runs_of(client, deployment, state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time=before)


def in_state(client, deployment, kind):
    return runs_of(client, deployment, state={"type": {"any_": [kind]}})


def shown(client, run):
    """What a run says of its look, for people."""
    from prefect.client.schemas.filters import ArtifactFilter

    [artifact] = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id={"any_": [run.id]}, key={"any_": ["trend-nightly"]})
    )
    return artifact.data


def events(name):
    asked = {"filter": {"event": {"name": [name]}}, "limit": 50}
    return httpx.post(f"{os.environ['PREFECT_API_URL']}/events/filter", json=asked, trust_env=False).json()["events"]


def test_scheduled_runs_appear_catch_up_once_and_events_start_runs_and_alerts(
    environment, client, deployed, alerts, tmp_path
):
    from tasks.store import Store

    # Nobody works yet: runs are due and missed.
    wait_for("missed runs", lambda: len(due(client, deployed)) > 1)
    missed = {run.id for run in due(client, deployed)}
    worker = "worker start --pool tripoise-cpu --type process --install-policy never --limit 4".split()
    with running(*worker, environment=environment):
        [first] = wait_for("a run", lambda: in_state(client, deployed, "COMPLETED"))
        [second] = wait_for("another", lambda: in_state(client, deployed, "RUNNING"))
        [schedule] = client.read_deployment_schedules(deployed.id)
        client.update_deployment_schedule(deployed.id, schedule.id, active=False)
        assert "auto-scheduled" in first.tags
        assert "| tuned | step-1 | first, accepted | 1.000 ± 0.000 |" in shown(client, first)
        # Of all that were missed one ran, or one that was due while the worker started; it cancelled the others.
        states = [run.state for run in runs_of(client, deployed) if run.id in missed - {first.id}]
        assert {state.type.value for state in states} == {"CANCELLED"}
        assert all("started later than this one was due" in one.message for one in states if one.name == "Cancelled")
        # The next one finds nothing new and computes nothing.
        second = wait_for("its end", lambda: (run := client.read_flow_run(second.id)).state.is_final() and run)
        assert "Nothing new." in shown(client, second)
        assert len(Store(tmp_path / "store").refs("scores")) == 3

        # Somebody publishes a worse checkpoint and says so.
        write_model(tmp_path / "models" / "step-2", without("f"), seed=2)
        before = {run.id for run in runs_of(client, deployed)}
        event = {
            "id": "0b4e5a4c-50c2-4d0e-8a0d-7f6a3f1c9f10",
            "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": "checkpoint.published",
            "resource": {"prefect.resource.id": "tripoise.model.tuned"},
            "payload": {},
        }
        answer = httpx.post(f"{environment['PREFECT_API_URL']}/events", json=[event], trust_env=False)
        assert answer.status_code == 204
        [started] = wait_for("a run", lambda: [run for run in runs_of(client, deployed) if run.id not in before])
        assert started.parameters["published"] == "tripoise.model.tuned"
        assert started.parameters["watch"] == deployed.parameters["watch"]
        run = wait_for("its end", lambda: (run := client.read_flow_run(started.id)).state.is_final() and run)
        assert run.state.type.value == "COMPLETED", run.state
        assert "| tuned | step-2 | regressed |" in shown(client, run)

        [regressed] = wait_for("its event", lambda: events("tripoise.score.regressed"))
        assert regressed["resource"]["prefect.resource.id"] == "tripoise.model.tuned"
        difference = share("helpful", without("f")) - 1
        assert regressed["payload"]["dimension"] == "helpful"
        assert regressed["payload"]["difference"] == pytest.approx(difference)
        [alert] = wait_for("its alert", lambda: alerts[1])
        assert alert["subject"] == "tuned: helpful regressed"
        assert f"step-2 ({regressed['payload']['digest'][:12]}): helpful 0.775, -0.225 against" in alert["body"]
        assert f", n = {regressed['payload']['n']}; significant." in alert["body"]
        assert alert["body"].rstrip().endswith(str(tmp_path / "models" / "step-2"))


def test_the_trend_page_is_drawn_in_a_browser_without_network_or_complaint(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip(f"no Chromium at {chromium}")
    keys = ("helpful", "honest", "harmless", "mean")
    change = {"value": -0.1, "low": -0.2, "high": -0.05, "p": 0.01, "outcome": "regressed", "why": "significant"}
    line = {
        "watched": "tuned",
        "origin": "",
        "written": "",
        "refs": [],
        "partial": True,
        "accepted": True,
        "against": "",
    }
    history = [
        line
        | {"time": f"2026-11-2{day}T03:00:00.000+00:00", "place": f"step-{day} <i>", "digest": str(day) * 64}
        | {"verdict": "regressed", "measure": "a" if day < 3 else "b"}
        | {"scores": {key: {"value": 0.5 + day / 20, "stderr": 0.02, "n": 40} for key in keys}}
        | {"changes": {key: change for key in keys} if day else {}}
        for day in range(5)
    ]
    copy = line | {"time": history[-1]["time"], "place": "same", "digest": "0" * 64, "verdict": "copy", "measure": ""}
    inputs = TrendInputs(
        title="nightly",
        suite="tiny",
        sources={"tuned": "/models", "empty": "s3://bucket/none"},
        accepted={"tuned": "4" * 64},
        rules=["A rule."],
        found=["empty: not reachable"],
        history=[*history, copy | {"scores": {}, "changes": {}}],
    )
    write_trend(inputs, tmp_path)
    told = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(chromium), args=["--headless", "--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if not request.url.startswith("file:") else None)
        page.goto((tmp_path / "trend.html").as_uri())
        page.wait_for_selector(".main-svg")
        # Four lines for each of two measures; five marks on each of the four.
        assert page.locator("g.trace.scatter").count() == 8
        assert page.locator("g.trace.scatter path.point").count() == 20
        assert page.locator("section table tbody tr").count() == 6
        wide = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert (told, wide) == ([], 390)
