"""The trend page of a watch: every source over time, each H with its standard error, and what the last look found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.report.figures import Figure, axis, label, layout
from tasks.report.leaderboard import KEYS, number, signed
from tasks.report.template import render

_SYMBOLS: Final = ("circle", "square", "diamond", "x")
_COLUMNS: Final = pa.schema(
    [(name, pa.string()) for name in ("time", "written", "source", "place", "digest", "verdict", "against", "measure")]
    + [("accepted", pa.bool_()), ("partial", pa.bool_()), ("dimension", pa.string())]
    + [(name, pa.float64()) for name in ("value", "stderr")]
    + [("n", pa.int64())]
    + [(name, pa.float64()) for name in ("difference", "low", "high", "p")]
    + [("outcome", pa.string()), ("why", pa.string())]
)


@dataclass(frozen=True, slots=True)
class TrendInputs:
    """What a trend page is made from."""

    title: str
    suite: str
    sources: Mapping[str, str]
    """Name to what is watched."""
    accepted: Mapping[str, str]
    """Name to the digest of the accepted checkpoint."""
    rules: Sequence[str]
    """How verdicts come about, in sentences."""
    found: Sequence[str]
    """What the last look left, could not read, or could not score, in sentences."""
    history: Sequence[Mapping[str, Any]]
    """Lines as :class:`tasks.watch.state.Seen` has them, oldest first."""


def write_trend(inputs: TrendInputs, out: Path) -> None:
    """Write ``trend.html``, ``trend.parquet`` and ``trend.json`` into the folder ``out``.

    The page is one file that needs no network; texts are shown literally. The table has a row for every scored
    checkpoint and H, and for their mean.
    """
    lines = {name: [one for one in inputs.history if one["watched"] == name] for name in inputs.sources}
    page = render(
        "trend.html.j2",
        inputs=inputs,
        lines=lines,
        figures={name: trend_figure(of) for name, of in lines.items() if any(one["scores"] for one in of)},
        keys=KEYS,
        number=number,
        signed=signed,
    )
    (out / "trend.json").write_text(json.dumps(asdict(inputs), indent=1, allow_nan=False), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(trend_rows(inputs.history), schema=_COLUMNS), out / "trend.parquet")
    (out / "trend.html").write_text(page, encoding="utf-8")


def trend_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One flat row for every scored checkpoint and key; a checkpoint without scores has one with none."""
    rows = []
    for one in history:
        common = {"source": one["watched"]} | {name: one[name] for name in _COLUMNS.names if name in one}
        for key in KEYS if one["scores"] else ():
            change = dict(one["changes"].get(key, {}))
            told = {name: change.get(name) for name in ("low", "high", "p", "outcome", "why")}
            rows.append(common | {"dimension": key, "difference": change.get("value")} | told | one["scores"][key])
        if not one["scores"]:
            rows.append(common)
    return rows


def trend_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Each H and the mean of one source over time; full marks are accepted checkpoints.

    A checkpoint stands at the time when it was written, where its source tells that, else when it was recorded. Scores
    of different suites, limits or judges are not joined by a line.
    """
    scored = sorted((one for one in lines if one["scores"]), key=_when)
    measures = list(dict.fromkeys(one["measure"] for one in scored))
    traces = []
    for place, key in enumerate(KEYS):
        color = f"var(--series-{place + 1})" if key != "mean" else "var(--ink)"
        for measure in measures:
            members = [one for one in scored if one["measure"] == measure]
            scores = [one["scores"][key] for one in members]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": key,
                    "legendgroup": key,
                    "showlegend": measure == measures[-1],
                    "x": [_when(one) for one in members],
                    "y": [one["value"] for one in scores],
                    "error_y": {
                        "type": "data",
                        "array": [one["stderr"] for one in scores],
                        **{"color": color, "thickness": 1, "width": 3},
                    },
                    "line": {"color": color, "width": 1.5},
                    "marker": {
                        "color": color,
                        "size": 9,
                        "symbol": [_SYMBOLS[place] + ("" if one["accepted"] else "-open") for one in members],
                    },
                    "customdata": [f"{label(one['place'])}, {one['verdict']}" for one in members],
                    "hovertemplate": f"{key} %{{y:.3f}}<br>%{{customdata}}<extra></extra>",
                }
            )
    axes = {"xaxis": axis(type="date"), "yaxis": axis("score", zeroline=False)}
    return {"data": traces, "layout": layout(380, margin={"l": 8, "r": 12, "t": 48, "b": 8}) | axes}


def _when(line: Mapping[str, Any]) -> str:
    return str(line["written"] or line["time"])
