"""Steps as Prefect task runs. The store is the memo; Prefect shows it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from merging_core.errors import CheckpointError, ProcessError
from tasks.apart import build_apart
from tasks.fan_out import fan_out, resources, started, wait_for
from tasks.progress import watched_by
from tasks.reporting import read_report
from tasks.steps import Step, resolve_with_progress
from tasks.store import Built, Ref, Store

# Sources are trained a core each; more at once would only take turns.
TASK_RUNNER: Final[Any] = ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1)


class AsPrefectTasks:
    """Run each group of steps as one task run; sources are resolved at the same time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_made = 0
        self.num_reused = 0

    def resolve(self, sources: Sequence[str]) -> list[Ref]:
        """See :class:`tasks.steps.Runner`."""
        futures = [resolve_source.submit(source, self.store) for source in sources]
        refs = [future.result() for future in futures]
        self._count(future.state for future in futures)
        return refs

    def build(self, name: str, title: str, steps: Sequence[Step]) -> list[Ref]:
        """See :class:`tasks.steps.Runner`. Where steps fan out, those that name a device do, their parts first."""
        missing = self._missing(steps) if (runner := fan_out()) else []
        if runner and missing:
            limited = [(part, step.timeout_minutes) for step in missing for part in step.parts()]
            self._submit(runner, name, [replace(part, timeout_minutes=limit) for part, limit in limited])
            self._submit(runner, name, [step for step in missing if step.device])
        return self.build_group(name, title, steps, begun=bool(missing))

    def map(self, name: str, groups: Sequence[tuple[str, Sequence[Step]]]) -> list[list[Ref]]:
        """See :class:`tasks.steps.Runner`."""
        if not (runner := fan_out()):
            return [self.build(name, title, steps) for title, steps in groups]
        missing = [self._missing(steps) for _, steps in groups]
        self._submit(runner, name, [step for steps in missing for step in steps])
        return [
            self.build_group(name, title, steps, begun=bool(lacking))
            for (title, steps), lacking in zip(groups, missing, strict=True)
        ]

    def build_group(self, name: str, title: str, steps: Sequence[Step], *, begun: bool) -> list[Ref]:
        """Run a group as one task run of this process.

        Args:
            name: of the task.
            title: of the task run.
            steps: one after the other.
            begun: whether this run had some of them made elsewhere: to the store that looks like reuse.
        """
        run = build_steps.with_options(name=name, task_run_name=_literal(title))
        state = run(list(steps), self.store, return_state=True)
        self._count([state], begun=begun)
        refs: list[Ref] = state.result()
        return refs

    def _submit(self, runner: TaskRunner[Any], name: str, steps: Sequence[Step]) -> None:
        """Run each step as a task of its own, several at a time; what others made stays if one fails.

        Raises:
            ProcessError: if what a step ran on died, again and again.
            CheckpointError: if a step was done by another machine, and its artifact is not here.
        """
        wanted = list({step.ref: (step, resources(step, runner)) for step in steps}.values())
        if not wanted:
            return
        futures = []
        with started(runner, [step for step, _ in wanted]):
            for step, room in wanted:
                task = build_steps.with_options(name=name, task_run_name=_literal(step.title))
                with room:
                    futures.append(runner.submit(task, {"steps": [step], "store": self.store}))
            wait_for(futures)
            for (step, _), future in zip(wanted, futures, strict=True):
                if future.state.is_crashed():
                    raise ProcessError(
                        f"{step.title}: what it ran on died ({future.state.message}). See Ray's own logs."
                    )
                future.result()
        for step, _ in wanted:
            if not self.store.bring(step.ref):
                mirror = f"the mirror {self.store.mirror}" if self.store.mirror else "there is no mirror"
                raise CheckpointError(
                    f"{step.title}: done by another machine, but {step.ref} is not in the store {self.store.root}, and "
                    f"{mirror}. Give all machines one store at the same path, or a mirror (TRIPOISE_MIRROR)."
                )

    def _missing(self, steps: Sequence[Step]) -> list[Step]:
        return [step for step in steps if self.store.find(step.kind, step.identity) is None]

    def _count(self, states: Iterable[State[Any]], *, begun: bool = False) -> None:
        for state in states:
            if state.name == "Cached" and not begun:
                self.num_reused += 1
            else:
                self.num_made += 1


@task(name="resolve", task_run_name="resolve {source}", cache_policy=NO_CACHE, persist_result=False)
def resolve_source(source: str, store: Store) -> Any:
    """Pin a source to content: hash, download or train; reused where the store has it."""
    with _progress_shown():
        built = resolve_with_progress(source, store)
    return _shown([built], built.ref)


@task(cache_policy=NO_CACHE, persist_result=False)
def build_steps(steps: list[Step], store: Store) -> Any:
    """Build artifacts that belong together; reused if the store has all of them. Never retried: nothing is random.

    What names a device or has a time limit is made in a process of its own; that one may be ended without this one.
    """
    with _progress_shown():
        heavy = any(step.device or step.timeout_minutes for step in steps)
        built = build_apart(steps, store) if heavy else [step.build(store) for step in steps]
    for step, one in zip(steps, built, strict=True):
        get_run_logger().info(
            "%s: %s %s in %.1f s", step.title, "reused" if one.reused else "made", one.ref, one.seconds
        )
    return _shown(built, [one.ref for one in built])


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(report: Ref, store: Store) -> None:
    """Show a report's leaderboard in the Prefect UI, as text and as a table, with the place of the page."""
    folder = store.folder(report)
    stored = read_report(folder)
    create_markdown_artifact(
        key="leaderboard",
        markdown=f"# {stored.title}\n\n{stored.markdown}\n\nReport: `{folder / 'report.html'}`\n",
        description=stored.title,
    )
    create_table_artifact(key="leaderboard-table", table=stored.rows, description=stored.title)


@contextmanager
def _progress_shown() -> Iterator[None]:
    """Show in the UI how far a long step is; one that ends within seconds shows nothing."""
    # Work may report from threads of its own, which do not know of this task run.
    context, shown = copy_context(), dict[str, UUID]()

    def show(title: str, done: int, total: int) -> None:
        percent = 100 * done / max(total, 1)
        # The step goes on without a display if the server does not answer.
        with suppress(Exception):
            if title in shown:
                context.run(update_progress_artifact, shown[title], progress=percent)
            else:
                shown[title] = context.run(create_progress_artifact, percent, key="progress", description=title)  # type: ignore[assignment]

    with watched_by(show):
        yield
    for title in shown:
        show(title, 1, 1)


def _shown(built: Sequence[Built], result: Any) -> Any:
    if not all(one.reused for one in built):
        return result
    reused = ", ".join(str(one.ref) for one in built)
    return Completed(name="Cached", message=f"reused {reused}", data=result)


def _literal(text: str) -> str:
    """A run name that Prefect does not read as a template."""
    return text.replace("{", "{{").replace("}", "}}")
