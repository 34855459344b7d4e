"""From a template beside this file to a page that holds all it needs: style, script, Plotly and figures."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tasks.report.figures import Figure

_HERE: Final = Path(__file__).parent


def render(template: str, *, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """Fill a template; every text in ``values`` is shown literally, and a name that is missing is an error.

    Args:
        template: name of a file in this folder.
        filters: what the template calls by ``|``, besides Jinja's own.
        values: what it names, besides ``figure_json``, ``style``, ``script`` and ``plotly``, which are given.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(
        figure_json=figure_json,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        **values,
    )


def figure_json(figure: Figure) -> Markup:
    """JSON that no text in it can end: inside a script element only ``<`` matters, written as an escape."""
    text = json.dumps(figure, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
