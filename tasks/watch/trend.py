"""The step that writes the trend: page, parquet and JSON; made again only if something new was found."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from merging_core.digest import digest_of
from tasks.report.trend import TrendInputs, write_trend
from tasks.steps import Step
from tasks.store import Ref, Store
from tasks.watch.records import Findings, Terms, Watched
from tasks.watch.state import State

TREND_VERSION: Final = 2
_EQUAL: Final = {
    "never": "So of checkpoints that are no different from the accepted one at all, up to about one in twenty is "
    "called different by chance. ",
    "automatic-if-not-worse": "The accepted one is the best of several means on these same samples, and flattered by "
    "that: in a simulation of checkpoints that are all equally good (250 samples for each H), 6% of the first five and "
    "13% of the next 25 were called regressed. ",
}


def trend_step(
    title: str, suite: str, sources: Sequence[Watched], terms: Terms, found: Findings, state: State, store: Store
) -> Step:
    """Write what a watch remembers, and what its last look left out."""
    inputs = TrendInputs(
        title=title,
        suite=suite,
        sources={one.name: one.source for one in sources},
        accepted=dict(state.accepted),
        rules=_rules(terms),
        found=told(found, state),
        history=[asdict(one) for one in state.history],
    )

    def make(out: Path) -> dict[str, Any]:
        write_trend(inputs, out)
        return {"watch": state.watch}

    refs = [Ref("scores", digest) for one in sources for digest in state.refs(one.name)]
    parents = tuple(sorted(ref for ref in refs if store.home(ref).exists()))
    identity = {"version": TREND_VERSION, "trend": json.loads(json.dumps(asdict(inputs)))}
    return Step("report", f"trend of {title}", {"trend": digest_of(identity), "watch": state.watch}, parents, make)


def told(found: Findings, state: State) -> list[str]:
    """What a look left out, in sentences that stay the same while nothing changes."""
    since = state.unreachable
    lines = [
        f"{one['watched']}: not reachable since {since[one['watched']]}: {one['why']}" for one in found.unreachable
    ]
    lines += [f"{one['watched']}, {one['place']}: {one['why']}" for one in found.failed]
    # Why it is left may say how many seconds ago something was written; that it is left is enough here.
    return lines + [f"{one['watched']}, {one['place']}: left for the next time, incomplete" for one in found.left]


def _rules(terms: Terms) -> list[str]:
    beyond = (
        f"Or it fell by more than {terms.tolerance:g}, which with few samples may be chance; that is said beside it. "
        if terms.tolerance is not None
        else ""
    )
    accepts = {
        "never": "A checkpoint is accepted only when a person approves it.",
        "automatic-if-not-worse": "A checkpoint becomes the accepted one if no H regressed and the mean did not fall; "
        "so the accepted one never goes down by steps that are each too small to be seen.",
    }
    return [
        "A new checkpoint is compared with the accepted one sample by sample (paired bootstrap, 10,000 resamples).",
        "An H regressed if it fell and the p-value, corrected over the three H (Holm), is below 0.05. " + beyond + "It "
        "improved if it rose and the corrected p-value is below 0.05.",
        _EQUAL[terms.accept] + "Intervals in brackets are 95% each, without that correction.",
        accepts[terms.accept],
        "Standard errors are over the samples of the suite, not over trainings: another run of the same training may "
        "differ by more.",
    ]
