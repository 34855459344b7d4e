"""Samplers: a function of seed and scores; a grid covers all."""

import pytest

from merging_core.errors import RecipeError
from tasks.recipes import parse_recipe
from tasks.sweep.proposals import foreseen, sampler
from tasks.sweep.settings import Searched
from tasks.sweep.space import Space

RECIPE = {"base": "b", "experts": {"helpful": "h", "honest": "t"}, "method": "ties"}


@pytest.fixture
def space():
    return Space(
        parse_recipe(RECIPE),
        [
            Searched(path="method.name", values=("linear", "ties", "tsvm")),
            Searched(path="method.scale", low=0.1, high=10.0, log=True),
            Searched(path="method.ties.density", low=0.1, high=0.9, step=0.1),
            Searched(path="experts.honest.weight", values=(0.5, 1.0, 2.0)),
        ],
    )


def proposals(name, space, seed, num, goal=0.3):
    """What is proposed where each H is a simple function of the point; every fourth point is given up."""
    source, found = sampler(name, space, num, seed), []
    for number in range(num):
        point = source.ask()
        found.append(point)
        scale = point.get("method.scale", 1.0) / 10
        weight = point["experts.honest.weight"] / 2
        source.tell(None if number % 4 == 3 else (1 - abs(scale - goal), weight, 1 - weight))
    return found


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_equal_seeds_propose_equal_points_and_more_trials_begin_with_the_same(space, name):
    found = proposals(name, space, 7, 20)
    assert proposals(name, space, 7, 30)[:20] == found
    assert proposals(name, space, 8, 20) != found


def test_tpe_learns_from_scores_and_random_search_does_not(space):
    assert proposals("random", space, 1, 30, goal=0.2) == proposals("random", space, 1, 30, goal=0.9)
    assert proposals("tpe", space, 1, 30, goal=0.2) != proposals("tpe", space, 1, 30, goal=0.9)


def test_what_is_foreseen_is_proposed_whatever_the_scores(space):
    for name, num in (("tpe", 10), ("random", 30)):
        known = foreseen(name, space, 30, 4)
        assert len(known) == num
        assert known == foreseen(name, space, 40, 4)[:num]
        assert known == proposals(name, space, 4, 30, goal=0.2)[:num] == proposals(name, space, 4, 30, goal=0.9)[:num]
    assert foreseen("tpe", space, 3, 4) == foreseen("tpe", space, 30, 4)[:3]


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_every_proposal_is_a_recipe_within_the_space(space, name):
    for point in proposals(name, space, 3, 40):
        method = point["method.name"]
        assert ("method.scale" in point) == (method != "linear")
        assert ("method.ties.density" in point) == (method == "ties")
        assert 0.1 <= point.get("method.scale", 1) <= 10
        assert point.get("method.ties.density", 0.1) in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        assert space.at(point).method.name == method


def test_a_grid_is_proposed_completely_and_refused_if_it_is_larger_than_the_trials():
    searched = [Searched(path="method.scale", values=(1.0, 2.0)), Searched(path="seed", low=0, high=2)]
    space = Space(parse_recipe(RECIPE), searched)
    source = sampler("grid", space, 6, seed=0)
    found = [source.ask() for _ in range(7)]
    assert found.pop() is None
    assert {(one["method.scale"], one["seed"]) for one in found} == {(a, b) for a in (1.0, 2.0) for b in range(3)}
    with pytest.raises(RecipeError, match="the grid has 6 points, and trials is 5"):
        sampler("grid", space, 5, seed=0)
