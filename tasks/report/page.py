"""The report page and the files beside it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.comparison import DIMENSIONS, Comparison
from tasks.report.figures import ROLES, dimension_bars, forest
from tasks.report.inputs import ReportInputs
from tasks.report.layers import decision_lines, interference_maps
from tasks.report.leaderboard import interval, leaderboard_rows, number, outcomes, sides, signed, spread
from tasks.report.template import render
from tasks.report.trade_off import trade_off


def write_report(inputs: ReportInputs, out: Path) -> None:
    """Write ``report.html``, ``leaderboard.parquet`` and ``report.json`` into the folder ``out``.

    The page is one file: it needs no network, its content policy forbids any. Equal inputs give equal bytes as long
    as the versions of Plotly and Arrow are the same.

    Args:
        inputs: what to show; every text in it is shown literally. Numbers must be finite.
        out: created where it does not exist; files of these names are replaced.

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    record = json.dumps(asdict(inputs), indent=1, ensure_ascii=False, allow_nan=False)
    table = _table(leaderboard_rows(inputs.comparison))
    page = _page(inputs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(record + "\n", encoding="utf-8")
    pq.write_table(table, out / "leaderboard.parquet")
    (out / "report.html").write_text(page, encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """The leaderboard's rows; a column without any value is kept, as float64."""
    table = pa.Table.from_pylist(rows)
    types = [pa.field(f.name, pa.float64() if pa.types.is_null(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(types))


def _page(inputs: ReportInputs) -> str:
    comparison, interference = inputs.comparison, inputs.interference
    return render(
        "page.html.j2",
        filters={
            **{"number": _or_dash(number), "signed": _or_dash(signed)},
            **{"interval": interval, "settings": _settings, "spread": spread},
        },
        inputs=inputs,
        comparison=comparison,
        rows=comparison.rows,
        dimensions=DIMENSIONS,
        roles={role: name for role, (name, _) in ROLES.items()},
        sides=sides(comparison),
        outcomes=outcomes,
        several=len(comparison.seeds) > 1,
        partial=any(row.partial for row in comparison.rows),
        groups={d: [b for b in comparison.benchmarks if b.dimension == d] for d in DIMENSIONS},
        leading=_leading(comparison),
        maps=interference_maps(interference) if interference else [],
        figures={"bars": dimension_bars(comparison), "trade-off": trade_off(comparison, "helpful", "harmless")}
        | ({"forest": forest(comparison)} if comparison.best_expert else {}),
        decision_lines=decision_lines,
    )


def _leading(comparison: Comparison) -> dict[str, float]:
    """Benchmark task to the best value of all models."""
    return {
        b.task: (max if b.higher_is_better else min)(row.benchmarks[b.task].value for row in comparison.rows)
        for b in comparison.benchmarks
    }


def _or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    """Show a dash where there is no value."""
    return lambda value: "–" if value is None else form(value)


def _settings(settings: dict[str, Any]) -> str:
    """Settings other than the method's name and scale, which have columns of their own."""
    rest = {key: value for key, value in settings.items() if key not in ("method", "scale")}
    return ", ".join(f"{key} = {value}" for key, value in rest.items())
