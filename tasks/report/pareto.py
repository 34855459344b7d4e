"""The page of a sweep: every trial on validation, two H against each other, with the Pareto set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from tasks.comparison import DIMENSIONS
from tasks.report.figures import Figure, axis, label, layout
from tasks.report.leaderboard import number
from tasks.report.template import render

# Kind of a point to its name, symbol, colour and size; later ones are drawn on top.
KINDS: Final[Mapping[str, tuple[str, str, str, int]]] = {
    "pruned": ("pruned, by its first samples", "circle-open", "var(--faint)", 7),
    "complete": ("trial", "circle", "var(--faint)", 8),
    "pareto": ("Pareto set", "circle", "var(--series-3)", 10),
    "chosen": ("chosen for test", "star", "var(--merged)", 14),
    "mixture": ("data mixture", "diamond", "var(--mixture)", 10),
    "expert": ("expert", "square", "var(--expert)", 10),
    "base": ("base", "x", "var(--base)", 10),
}


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One trial, or a model that trials are held against."""

    name: str
    kind: str
    """One of ``KINDS``, or refused: listed, not drawn."""
    scores: Mapping[str, float]
    """Each H and ``mean``; empty without scores."""
    settings: Mapping[str, Any]
    """What the trial set, by path."""
    note: str
    """Why it was chosen, pruned or refused."""


def write_pareto(title: str, suite: str, points: Sequence[ParetoPoint], out: Path) -> None:
    """Write ``pareto.html`` into the folder ``out``: one file that needs no network; texts are shown literally."""
    page = render(
        "pareto.html.j2",
        title=title,
        suite=suite,
        points=points,
        dimensions=DIMENSIONS,
        kinds={kind: name for kind, (name, *_) in KINDS.items()} | {"refused": "refused"},
        figures={f"{x}-{y}": (x, y, pair_figure(points, x, y)) for x, y in combinations(DIMENSIONS, 2)},
        counts=_counts(points),
        settings_text=settings_text,
        number=number,
    )
    (out / "pareto.html").write_text(page, encoding="utf-8")


def pair_figure(points: Sequence[ParetoPoint], across: str, up: str) -> Figure:
    """All points in two H, and the steps of what no completed trial beats in this pair."""
    front = _front([one for one in points if one.kind in ("complete", "pareto", "chosen")], across, up)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "showlegend": False,
            "x": [one.scores[across] for one in front],
            "y": [one.scores[up] for one in front],
            "line": {"color": "var(--line-strong)", "width": 2, "dash": "dot", "shape": "vh"},
            "hoverinfo": "skip",
        }
    ]
    for kind, (name, symbol, color, size) in KINDS.items():
        members = [one for one in points if one.kind == kind and one.scores]
        if members:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [one.scores[across] for one in members],
                    "y": [one.scores[up] for one in members],
                    "customdata": [f"{label(one.name)}<br>{label(settings_text(one.settings), 60)}" for one in members],
                    "hovertemplate": f"%{{customdata}}<br>{across} %{{x:.3f}}<br>{up} %{{y:.3f}}<extra></extra>",
                    "marker": {"color": color, "symbol": symbol, "size": size},
                }
            )
    axes = {"xaxis": axis(across, zeroline=False), "yaxis": axis(up, zeroline=False)}
    return {"data": traces, "layout": layout(440, margin={"l": 8, "r": 12, "t": 72, "b": 8}) | axes}


def settings_text(settings: Mapping[str, Any]) -> str:
    """What a trial set, in one line."""
    return ", ".join(
        f"{path} = {value:.4g}" if isinstance(value, float) else f"{path} = {value}" for path, value in settings.items()
    )


def _front(points: Sequence[ParetoPoint], across: str, up: str) -> list[ParetoPoint]:
    """Points that no other beats in these two H, by rising ``across``."""
    front: list[ParetoPoint] = []
    for one in sorted(points, key=lambda p: (-p.scores[across], -p.scores[up], p.name)):
        if not front or one.scores[up] > front[-1].scores[up]:
            front.append(one)
    return front[::-1]


def _counts(points: Sequence[ParetoPoint]) -> dict[str, int]:
    kinds = [one.kind for one in points]
    return {
        "trials": sum(kind in ("pruned", "complete", "pareto", "chosen", "refused") for kind in kinds),
        "pruned": kinds.count("pruned"),
        "refused": kinds.count("refused"),
        "pareto": kinds.count("pareto") + kinds.count("chosen"),
        "chosen": kinds.count("chosen"),
    }
