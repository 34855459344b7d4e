"""From scores on disk to the scores of each H, to the choice on validation and to the comparison."""

from statistics import fmean

import pytest

from merging_core.errors import NumericalError, RecipeError
from tasks.reporting import Entry, best_on_validation, compared, dimension_scores
from tasks.scores import Asked, Sample, Scored, write_scores
from tasks.suite import load_suite

SUITE = load_suite("3h-mini")
TASKS = [one.task for one in SUITE.benchmarks]


def scores(store, name, values):
    """Scores of one model on every benchmark of the suite: ``values`` by task, else four right of five."""
    refs = []
    for task in TASKS:
        drawn = values.get(task, [1.0, 1.0, 0.0, 1.0, 1.0])
        asked = Asked(task, "validation", False, 0, "1", "yes", False)
        samples = tuple(Sample(str(number), "?", "", "", value) for number, value in enumerate(drawn))
        scored = Scored(asked, "acc", samples)
        refs.append(
            store.build("scores", {"model": name, "task": task}, lambda out, one=scored: write_scores(one, out)).ref
        )
    return refs


def entry(store, name, seed, refs):
    model = store.build("merged", {"model": name, "seed": seed}, lambda out: {}).ref
    return Entry(name, "merged", model, refs, seed=seed)


@pytest.fixture
def unread(store):
    """Two seeds; in the second no verdict on the first benchmark could be read."""
    return [scores(store, "seed 0", {}), scores(store, "seed 1", {TASKS[0]: [None] * 5})]


def test_a_value_is_the_mean_over_what_could_be_read_and_over_the_seeds(store):
    refs = scores(store, "seed 0", {}) + scores(store, "seed 1", {task: [1.0, None, 0.0, 0.0, 0.0] for task in TASKS})
    found = dimension_scores(refs, SUITE, store)
    for dimension in ("helpful", "honest", "harmless", "mean"):
        assert found[dimension] == pytest.approx(fmean([0.8, 0.25]))


def test_a_seed_in_which_nothing_could_be_read_is_not_filled_by_the_others(store, unread):
    everything = [ref for refs in unread for ref in refs]
    with pytest.raises(NumericalError, match=f"none of the 5 verdicts on benchmark {TASKS[0]} could be read"):
        dimension_scores(everything, SUITE, store)
    with pytest.raises(NumericalError, match="could be read"):
        best_on_validation([[*unread[0], *unread[0]], everything], SUITE, store)


def test_the_comparison_refuses_the_same_seed(store, unread):
    entries = [entry(store, "merge", seed, refs) for seed, refs in enumerate(unread)]
    with pytest.raises(RecipeError, match=f"{TASKS[0]}.*at least 2 samples that have a value from every model"):
        compared(SUITE, entries, store)


def test_the_best_on_validation_is_chosen_over_all_seeds_and_of_equals_the_first(store):
    low, high = (scores(store, str(value), {task: [value] * 4 for task in TASKS}) for value in (0.25, 0.75))
    middle = scores(store, "middle", {task: [0.5] * 4 for task in TASKS})
    assert best_on_validation([[*low, *middle], [*low, *high], [*high, *low]], SUITE, store) == 1
