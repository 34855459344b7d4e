"""Plots of what happens layer by layer: interference of the experts, and what r_tsvm decided."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Final

from tasks.report.figures import Figure, axis, label, layout, row_axis
from tasks.report.inputs import Interference, LayerDiagnostics

_IN_LAYER: Final = re.compile(r"((?:[^.]*\.)*?)(\d+)\.(.+)")
_DIVERGING: Final = [[0.0, "var(--below)"], [0.5, "var(--even)"], [1.0, "var(--above)"]]
_OUTSIDE: Final = "–"


def locate(tensor: str) -> tuple[int | None, str]:
    """Split a tensor name at its first number: ``model.layers.3.mlp.up_proj.weight`` is layer 3 of the kind
    ``model.layers.*.mlp.up_proj.weight``. Without a number the layer is None and the kind is the name.
    """
    found = _IN_LAYER.fullmatch(tensor)
    return (int(found[2]), f"{found[1]}*.{found[3]}") if found else (None, tensor)


def interference_maps(interference: Interference) -> list[Figure]:
    """One heat map a pair of experts: kinds of tensors by layer; tensors outside the layers stand at the left.

    All maps share one scale, symmetric around 0.
    """
    places = [locate(tensor) for tensor in interference.tensors]
    columns = _layer_labels([layer for layer, _ in places])
    kinds = list(dict.fromkeys(kind for _, kind in places))
    reach = max((abs(c) for row in interference.cosine for c in row if c is not None), default=0.0) or 1.0
    maps = []
    for p in range(len(interference.pairs)):
        cells: list[list[float | None]] = [[None] * len(columns) for _ in kinds]
        names = [[""] * len(columns) for _ in kinds]
        for tensor, (layer, kind), row in zip(interference.tensors, places, interference.cosine, strict=True):
            i, j = kinds.index(kind), columns.index(_layer_label(layer))
            cells[i][j], names[i][j] = row[p], label(tensor, 60)
        trace = {
            "type": "heatmap",
            "z": cells,
            "x": columns,
            "y": list(range(len(kinds))),
            "text": names,
            "zmin": -reach,
            "zmax": reach,
            "colorscale": _DIVERGING,
            "xgap": 1,
            "ygap": 1,
            "colorbar": {"thickness": 8, "outlinewidth": 0, "tickformat": "+.2f", "nticks": 5},
            "hovertemplate": "%{text}<br>cosine %{z:+.3f}<extra></extra>",
        }
        size = layout(len(kinds) * 20 + 70, margin={"l": 8, "r": 0, "t": 8, "b": 8})
        up = row_axis(_shortened(kinds), 18) | {"ticks": ""}
        maps.append({"data": [trace], "layout": size | {"xaxis": _layer_axis(columns), "yaxis": up}})
    return maps


def decision_lines(diagnostics: Sequence[LayerDiagnostics], what: str) -> Figure:
    """The ``"weights"`` or ``"ranks"`` of each expert by layer: one dot a tensor, a line through the layers' means."""
    layers = [locate(entry.tensor)[0] for entry in diagnostics]
    columns = _layer_labels(layers)
    experts = list(dict.fromkeys(expert for entry in diagnostics for expert in getattr(entry, what)))
    traces: list[dict[str, Any]] = []
    for k, expert in enumerate(experts):
        color = f"var(--series-{k % 6 + 1})"
        points = [
            (columns.index(_layer_label(layer)), getattr(entry, what)[expert], label(entry.tensor, 60))
            for layer, entry in zip(layers, diagnostics, strict=True)
            if expert in getattr(entry, what)
        ]
        common = {"type": "scatter", "legendgroup": str(k), "name": label(expert)}
        dots: dict[str, Any] = {
            "mode": "markers",
            "marker": {"color": color, "size": 5, "opacity": 0.35},
            "showlegend": False,
            "x": [columns[c] for c, _, _ in points],
            "y": [value for _, value, _ in points],
            "text": [tensor for _, _, tensor in points],
            "hovertemplate": "%{text}<br>%{y:.4g}",
        }
        reached = sorted({c for c, _, _ in points})
        line: dict[str, Any] = {
            "mode": "lines",
            "line": {"color": color, "width": 2},
            "x": [columns[c] for c in reached],
            "y": [fmean(value for c, value, _ in points if c == column) for column in reached],
            "hovertemplate": "layer %{x}, mean %{y:.4g}",
        }
        traces += [common | dots, common | line]
    axes = {"xaxis": _layer_axis(columns), "yaxis": axis(zeroline=False, rangemode="tozero")}
    return {"data": traces, "layout": layout(300) | axes}


def _layer_label(layer: int | None) -> str:
    return _OUTSIDE if layer is None else str(layer)


def _layer_labels(layers: Sequence[int | None]) -> list[str]:
    """Labels of the layers in order, those outside first."""
    return [_layer_label(layer) for layer in sorted(set(layers), key=lambda layer: -1 if layer is None else layer)]


def _layer_axis(columns: list[str]) -> dict[str, Any]:
    order = {"type": "category", "categoryorder": "array", "categoryarray": columns}
    return axis("layer", **order, showgrid=False, ticks="", tickangle=0)


def _shortened(kinds: list[str]) -> list[str]:
    """Keep what follows the layer and its module, without ``.weight``, where that still tells all kinds apart."""
    tails = [kind.rpartition("*.")[2].removesuffix(".weight") for kind in kinds]
    short = [tail.partition(".")[2] or tail for tail in tails]
    return short if len(set(short)) == len(kinds) else kinds
