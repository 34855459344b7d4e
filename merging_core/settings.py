"""Settings: frozen dataclasses whose bounds stand in their annotations.

One declaration serves three readers. The core checks it when an object is made; pydantic, which the core does not
know, reads the same annotations for messages with a path and for the run form; a person reads the text under the field.
"""

import math
import typing
from typing import Any, Final

from annotated_types import Ge, Gt, Le

from merging_core.errors import RecipeError

# Read by pydantic where a settings class stands in a parameter model: a misspelt setting is refused, not ignored.
STRICT: Final = {"extra": "forbid", "use_attribute_docstrings": True}


def check_bounds(settings: Any, subject: str) -> None:
    """Compare every annotated number of a settings object with its bounds.

    Raises:
        RecipeError: naming ``subject``, the setting, its bound and the value; NaN and infinity are refused too.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        for bound in getattr(hint, "__metadata__", ()):
            value = getattr(settings, name)
            # A bool is an int to Python; a weight of True is a mistake.
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not _holds(value, bound):
                raise RecipeError(f"{subject}: {name} must be a finite number {_text(bound)}, got {value!r}.")


def check_choices(settings: Any, subject: str) -> None:
    """Compare every field annotated with a ``Literal`` with its choices.

    Raises:
        RecipeError: naming ``subject``, the setting, the choices and the value.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices and (value := getattr(settings, name)) not in choices:
            raise RecipeError(f"{subject}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _holds(value: float, bound: Ge | Gt | Le) -> bool:
    comparison, limit = _bound(bound)
    return {">=": value >= limit, ">": value > limit, "<=": value <= limit}[comparison]


def _text(bound: Ge | Gt | Le) -> str:
    comparison, limit = _bound(bound)
    return f"{comparison} {limit:g}"


def _bound(bound: Ge | Gt | Le) -> tuple[str, float]:
    match bound:
        case Ge(ge=limit):
            comparison = ">="
        case Gt(gt=limit):
            comparison = ">"
        case Le(le=limit):
            comparison = "<="
    return comparison, typing.cast(float, limit)
