"""One look at watched sources, with a server or without."""

from dataclasses import asdict
from typing import Any

from flows.pipeline import Exam
from flows.watch_parameters import Watch
from tasks.steps import Runner
from tasks.store import Ref
from tasks.watch.looks import Tell, look_around
from tasks.watch.records import Findings, Laboratory
from tasks.watch.state import remembered, save
from tasks.watch.trend import trend_step


def look_again(watch: Watch, run: Runner, tell: Tell | None, published: str = "") -> tuple[Ref, Findings]:
    """Look at all sources once; gives the trend and what was found.

    Looks of one watch take turns on one machine: of two at the same time the second finds nothing new.

    Args:
        watch: what is watched, and how models are evaluated.
        run: runs the steps.
        tell: is called with every event that nobody was told of yet, see :func:`tasks.watch.looks.look_around`.
        published: name of a source of which somebody says that all has arrived.

    Raises:
        RecipeError: if the suite cannot be run, or what shall be approved was never scored.
        CheckpointError: if no source at all can be looked at.
    """
    exam = Exam.of(watch, run)
    laboratory = Laboratory(lambda source: run.resolve([source])[0], exam.scores, exam.suite, run.store)
    with remembered(watch.name, run.store) as state:
        for digest in watch.approve:
            state.approve(digest)
        save(state, run.store)
        sources = watch.watched(published)
        found = look_around(sources, watch.terms(), laboratory, state, tell)
        step = trend_step(watch.name, exam.suite.name, sources, watch.terms(), found, state, run.store)
        [report] = run.build("report", step.title, [step])
    return report, found


def summarized(found: Findings) -> dict[str, Any]:
    """What a look found, as plain JSON."""
    return {
        "recorded": [asdict(one) for one in found.recorded],
        "left": found.left,
        "failed": found.failed,
        "unreachable": found.unreachable,
        "events": [{"event": one.name, "model": one.model, "payload": one.payload} for one in found.events],
    }
