"""Which point of a search space comes next, by what the points before it gave.

A sampler is a function of its seed and of what it was told. Nothing of it is stored: a sweep that is run again asks for
the same points, whose merges and scores the store has, and so goes on where it stopped. For the same reason more trials
begin with the same ones.
"""

from collections.abc import Sequence
from typing import Final, Literal, Protocol

from merging_core.errors import RecipeError
from tasks.sweep.settings import Value
from tasks.sweep.space import Dial, Point, Space

SamplerName = Literal["tpe", "random", "grid"]
_DRAWN_AT_RANDOM: Final = 10
"""Trials before ``tpe`` looks at scores."""


class Sampler(Protocol):
    """Proposes points, and is told what each gave before it proposes the next."""

    def ask(self) -> Point | None:
        """The next point; None if there is none left."""

    def tell(self, scores: Sequence[float] | None) -> None:
        """What the point that was asked for last gave: a score for each H, or None for one that was given up."""


class Grid:
    """Every point once."""

    def __init__(self, space: Space) -> None:
        self._left = iter(space.grid())

    def ask(self) -> Point | None:
        """See :class:`Sampler`."""
        return next(self._left, None)

    def tell(self, scores: Sequence[float] | None) -> None:
        """See :class:`Sampler`."""


class OptunaSampler:
    """Random search, or the tree-structured Parzen estimator for several objectives, by Optuna.

    ``tpe`` draws ten points at random. Then it splits the trials so far into a good part (by rank of non-domination,
    then by hypervolume) and the rest, and proposes what is likely in the one and not in the other. It is chosen over
    NSGA-II because a sweep has tens of trials: a genetic algorithm is still drawing its first generation then. And it
    treats settings that only some methods have by themselves, from the trials that had them.

    References:
        Ozaki et al., Multiobjective tree-structured Parzen estimator for computationally expensive optimization
        problems, GECCO 2020.   Deviation: as in Optuna 5, each setting is estimated alone.
    """

    def __init__(self, name: Literal["tpe", "random"], space: Space, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=_DRAWN_AT_RANDOM, multivariate=False)
            if name == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        self._space = space
        self._study = optuna.create_study(directions=["maximize"] * 3, sampler=sampler)
        self._trial: optuna.Trial | None = None

    def ask(self) -> Point:
        """See :class:`Sampler`."""
        self._trial = self._study.ask()
        return self._space.propose(self._suggest)

    def tell(self, scores: Sequence[float] | None) -> None:
        """See :class:`Sampler`."""
        from optuna.trial import TrialState

        assert self._trial is not None
        if scores is None:
            # Pruned trials count among the bad ones.
            self._study.tell(self._trial, state=TrialState.PRUNED)
        else:
            self._study.tell(self._trial, list(scores))

    def _suggest(self, dial: Dial) -> Value:
        assert self._trial is not None
        if dial.points is None:
            if dial.whole:
                return self._trial.suggest_int(dial.path, int(dial.low), int(dial.high), log=dial.log)
            return self._trial.suggest_float(dial.path, dial.low, dial.high, log=dial.log)
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in dial.points):
            # By number: neighbours are alike, which a list of choices would not say.
            return dial.points[self._trial.suggest_int(dial.path, 0, len(dial.points) - 1)]
        return dial.points[self._trial.suggest_categorical(dial.path, list(range(len(dial.points))))]


def sampler(name: SamplerName, space: Space, num_trials: int, seed: int) -> Sampler:
    """The sampler of a sweep.

    Raises:
        RecipeError: if a grid has more points than trials are allowed.
    """
    if name != "grid":
        return OptunaSampler(name, space, seed)
    if (size := len(space.grid())) > num_trials:
        raise RecipeError(
            f"sweep: the grid has {size} points, and trials is {num_trials}. Raise it, or try fewer values."
        )
    return Grid(space)


def foreseen(name: SamplerName, space: Space, num_trials: int, seed: int) -> list[Point]:
    """The first points of a sweep, up to where scores decide: of ``grid`` and ``random`` all of them."""
    asked = sampler(name, space, num_trials, seed)
    points: list[Point] = []
    while len(points) < min(num_trials, _DRAWN_AT_RANDOM if name == "tpe" else num_trials):
        if (point := asked.ask()) is None:
            break
        asked.tell(None)
        points.append(point)
    return points
