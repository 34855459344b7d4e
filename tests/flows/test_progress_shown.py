"""How far a long step is, as the server shows it."""

import threading

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from tasks import progress
from tasks.orchestration import AsPrefectTasks
from tasks.steps import Step
from tasks.store import Store

pytestmark = pytest.mark.usefixtures("prefect_server")


def run_with(make, store):
    """Progress artifacts of a run that builds one artifact, from first to last."""

    @flow
    def build():
        AsPrefectTasks(store).build(
            "make", "make {it}", [Step("data", "make {it}", {"made by": make.__name__}, (), make)]
        )

    state = build(return_state=True)
    state.result()
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
        return client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=of_run))


def slow(out):
    """Reports from threads of its own, as a merge does."""
    (out / "data").write_text("x")
    seen = []
    with progress.track("a long step", "items") as report:
        for done in (1, 2, 3):
            thread = threading.Thread(target=lambda done=done: (report(done, 4), seen.append(done)))
            thread.start()
            thread.join()
    assert seen == [1, 2, 3]


def test_a_long_step_has_a_progress_bar_that_ends_full(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    [shown] = run_with(slow, Store(tmp_path))
    assert (shown.type, shown.key, shown.description, shown.data) == ("progress", "progress", "a long step", 100.0)
    assert shown.task_run_id


def test_a_short_step_has_none(tmp_path):
    assert run_with(slow, Store(tmp_path)) == []


def test_a_step_goes_on_where_its_progress_cannot_be_shown(tmp_path, monkeypatch):
    from tasks import orchestration

    def refuse(*_, **__):
        raise OSError("no answer")

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(orchestration, "create_progress_artifact", refuse)
    assert run_with(slow, Store(tmp_path)) == []
