"""The search space: every setting that is varied, and the recipe of each of its points."""

import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any, Final

from merging_core.errors import RecipeError
from merging_core.methods import METHODS
from merging_core.recipe import Recipe
from merging_core.rules import Lines
from tasks.names import check_names, repeated
from tasks.recipes import AnyExpert, parse_recipe, validated
from tasks.sweep.settings import Searched, Value

METHOD: Final = "method.name"
Point = dict[str, Value]
"""Path to value: what one trial sets."""
_OTHERS: Final = ("compute_dtype", "dtype", "seed")


@dataclass(frozen=True, slots=True)
class Dial:
    """One setting with what can be proposed for it."""

    path: str
    points: tuple[Value, ...] | None
    """Every value; None for a range without steps."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Whether the setting is a whole number."""


@dataclass(frozen=True, slots=True)
class Space:
    """A recipe and what is varied in it.

    A path is ``method.name``; ``method.SETTING``, varied for every method that has it; ``method.METHOD.SETTING``,
    varied only where METHOD is tried and then in place of ``method.SETTING``; ``experts.NAME.weight``;
    ``lines.alpha``, ``lines.beta``; ``compute_dtype``, ``dtype`` or ``seed``. A method other than the recipe's starts
    from its defaults.

    Raises:
        RecipeError: for a path that does not exist, with the nearest right one, one that stands twice, and a value that
            is out of its bounds, each before anything runs.
    """

    recipe: Recipe
    searched: Sequence[Searched]
    dials: dict[str, list[Dial]] = field(init=False)
    """Method to what is varied with it, in the order of the file."""

    def __post_init__(self) -> None:
        if twice := repeated(one.path for one in self.searched):
            raise RecipeError(f"search: {twice[0]!r} stands twice.")
        by_path = {one.path: one for one in self.searched}
        chosen = by_path.pop(METHOD, None)
        if chosen and not chosen.values:
            raise RecipeError(f"search {METHOD}: give a list of methods; there is no range of them.")
        methods = [str(name) for name in chosen.values] if chosen else [self.recipe.method.name]
        check_names(f"search {METHOD}", dict.fromkeys(methods), METHODS)
        check_names("search", by_path, self._paths(methods))
        object.__setattr__(self, "dials", {name: [*self._dials(name, by_path)] for name in methods})
        if unused := set(by_path) - {dial.path for dials in self.dials.values() for dial in dials}:
            raise RecipeError(f"search {min(unused)}: every method has an entry of its own for it. Leave it out.")
        for name, dials in self.dials.items():
            self._check(name, [by_path[dial.path] for dial in dials])

    def propose(self, choose: Callable[[Dial], Value]) -> Point:
        """One point of the space; what is varied depends on the method that was chosen first."""
        [method, *others] = self.dials
        if others:
            method = str(choose(Dial(METHOD, tuple(self.dials))))
        return self._head(method) | {dial.path: choose(dial) for dial in self.dials[method]}

    def grid(self) -> list[Point]:
        """Every point, the last setting varied fastest.

        Raises:
            RecipeError: for a range that has no steps.
        """
        if endless := [dial.path for dials in self.dials.values() for dial in dials if dial.points is None]:
            raise RecipeError(f"search {endless[0]}: a grid needs a list of values, or a range with a step.")
        found = []
        for method, dials in self.dials.items():
            paths = [dial.path for dial in dials]
            values = [dial.points or () for dial in dials]
            found += [self._head(method) | dict(zip(paths, chosen, strict=True)) for chosen in product(*values)]
        return found

    def at(self, point: Point) -> Recipe:
        """The recipe of one point.

        Raises:
            RecipeError: if the values do not go together.
        """
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self.recipe)))
        method = str(point.get(METHOD, self.recipe.method.name))
        if method != self.recipe.method.name:
            plain["method"] = {"name": method}
        experts = {expert["name"]: expert for expert in plain["experts"]}
        for path, value in point.items():
            match path.split("."):
                case ["experts", *name, entry]:
                    experts[".".join(name)][entry] = value
                case ["method", *_, entry]:
                    plain["method"][entry] = value
                case ["lines", entry]:
                    plain["lines"] = (plain["lines"] or {}) | {entry: value}
                case [entry]:
                    plain[entry] = value
        return parse_recipe(plain)

    def _head(self, method: str) -> Point:
        """How a point names its method, unless there is no other than the recipe's."""
        return {} if list(self.dials) == [self.recipe.method.name] else {METHOD: method}

    def _paths(self, methods: Sequence[str]) -> list[str]:
        settings = {name: [one.name for one in fields(METHODS[name]) if one.name != "name"] for name in methods}
        shared = dict.fromkeys(setting for names in settings.values() for setting in names)
        return [
            *(f"method.{setting}" for setting in shared),
            *(f"method.{name}.{setting}" for name, names in settings.items() for setting in names),
            *(f"experts.{expert.name}.weight" for expert in self.recipe.experts),
            *(f"lines.{one.name}" for one in fields(Lines)),
            *_OTHERS,
            METHOD,
        ]

    def _dials(self, method: str, by_path: Mapping[str, Searched]) -> Iterator[Dial]:
        shape = METHODS[method]
        for path, searched in by_path.items():
            parts = path.split(".")
            whole = path == "seed"
            if parts[0] == "method":
                setting, of = parts[-1], parts[1:-1]
                if of not in ([], [method]) or setting not in {one.name for one in fields(shape)}:
                    continue
                if not of and f"method.{method}.{setting}" in by_path:
                    continue
                kind = typing.get_type_hints(shape)[setting]
                whole = kind is int
                if not searched.values and kind not in (int, float):
                    raise RecipeError(f"search {path}: {setting} is not a number. Give a list of values.")
            elif path in ("compute_dtype", "dtype") and not searched.values:
                raise RecipeError(f"search {path}: it is not a number. Give a list of values.")
            bounds = [one for one in (searched.low, searched.high, searched.step) if one is not None]
            if whole and any(one % 1 for one in bounds):
                raise RecipeError(f"search {path}: low, high and step must be whole numbers, got {bounds}.")
            low, high = searched.low or 0.0, searched.high or 0.0
            yield Dial(path, searched.points(whole), low, high, searched.log, whole)

    def _check(self, method: str, searched: Sequence[Searched]) -> None:
        """Try the recipe with each single value; what does not go together only shows at a point."""
        head: Point = {METHOD: method}
        for path, value in [(METHOD, method), *((one.path, edge) for one in searched for edge in one.edges)]:
            try:
                if path.startswith("experts."):
                    # By itself: whether weights cancel is a matter of all of them.
                    validated(AnyExpert, {"name": path, "source": path, "weight": value}, "expert")
                else:
                    self.at(head | {path: value})
            except RecipeError as error:
                raise RecipeError(f"search {path}: {error}") from error
