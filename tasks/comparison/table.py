"""From the samples of many models to the rows of one comparison."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tasks.comparison.families import Members, by_seed, choose, mean_validation, require_comparable
from tasks.comparison.notes import write_notes
from tasks.comparison.ranks import shared_ranks
from tasks.comparison.records import (
    DIMENSIONS,
    METHOD_ROLES,
    Benchmark,
    Comparison,
    Difference,
    ModelSamples,
    Row,
)
from tasks.comparison.significance import holm, hypervolume
from tasks.comparison.statistics import (
    Array,
    Differences,
    ModelScores,
    Resampled,
    align,
    mean_over_seeds,
    paired_differences,
    resample_scores,
    score_model,
)


def compare(
    models: Sequence[ModelSamples],
    benchmarks: Sequence[Benchmark],
    *,
    suite: str,
    seed: int = 0,
    num_resamples: int = 10_000,
) -> Comparison:
    """Score every model by dimension and compare each with the base and with the best expert.

    With benchmark means ``m_b`` (``1 - m_b`` where lower is better), sample variances ``v_b`` (ddof 1) and weights
    ``w_b`` that sum to 1 within a dimension: ``score_d = sum_b w_b m_b``, ``stderr_d^2 = sum_b w_b^2 v_b / n_b``,
    ``mean = sum_d score_d / 3``, ``stderr^2 = sum_d stderr_d^2 / 9``. Samples count as independent draws and the set
    of benchmarks as fixed. Intervals: samples are resampled within each benchmark, the same draws for all models; the
    2.5 and 97.5 percentiles of the resampled differences. They hold one comparison at a time, not all jointly; the
    p-values of merges and mixtures against one reference are corrected over all of them (Holm).

    Over ``S`` seeds every score and difference is the mean of those within the seeds and ``stderr^2 = sum_s stderr_s^2
    / S^2``; samples are resampled within each benchmark of each seed. Both speak of other samples for the same models:
    what other seeds would give is told by the values of the seeds beside them, and by nothing else.

    Samples on which a model has no value are left out for all models, and counted.

    Args:
        models: at least one; within a seed distinct names, at most one base, the same sample ids for every benchmark;
            the same names in every seed.
        benchmarks: distinct tasks; every dimension needs at least one. Tasks outside the list are ignored.
        suite: name for display.
        seed: of the bootstrap, >= 0. Order of models, benchmarks and samples does not matter.
        num_resamples: bootstrap resamples, >= 1.

    Raises:
        RecipeError: a dimension without a benchmark, a repeated name, fewer than two samples, a value outside [0, 1].
        IncompatibleError: models whose sample ids differ.
        NumericalError: a value that is not finite.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: percentile interval.
        Deviation: resampling is stratified by benchmark.
    """
    benchmarks = sorted(benchmarks, key=lambda b: b.task)
    families = by_seed(models)
    require_comparable(families, benchmarks)
    seeds = sorted(families)
    aligned = {own_seed: [align(families[own_seed], benchmark) for benchmark in benchmarks] for own_seed in seeds}
    values = [[samples for samples, _ in aligned[own_seed]] for own_seed in seeds]
    names = [model.name for model in families[seeds[0]]]
    members = [[families[own_seed][i] for own_seed in seeds] for i in range(len(names))]
    scores = [
        mean_over_seeds([score_model(benchmarks, [samples[i] for samples in own]) for own in values])
        for i in range(len(names))
    ]
    chosen = choose(members, scores)
    references = [j for j in (chosen.base, chosen.expert, chosen.tsvm) if j is not None]
    pairs = [(i, j) for j in references for i in range(len(names))]
    pairs += [pair for pair in chosen.contests if pair not in pairs]
    resampled = resample_scores(values, benchmarks, seeds, seed=seed, num_resamples=num_resamples)
    differences = paired_differences(resampled, scores, benchmarks, pairs)
    contests = {pair: differences[pair]["mean"] for pair in chosen.contests}
    methods = [i for i, own in enumerate(members) if own[0].role in METHOD_ROLES]
    _correct(differences, methods, references)
    ranks = _ranks(methods, names, scores, resampled)

    points = np.array([[score.dimensions[d].value for d in DIMENSIONS] for score in scores])
    strengths = _strengths(members, scores)
    rows = [
        _row(
            own,
            scores[i],
            strengths,
            against={
                f"against_{name}": {} if j is None else differences[i, j]
                for name, j in (("base", chosen.base), ("best_expert", chosen.expert), ("tsvm", chosen.tsvm))
            },
            pareto=not _dominated(points, i),
            rank=ranks.get(i),
        )
        for i, own in enumerate(members)
    ]
    left_out = {b.task: sum(aligned[own_seed][k][1] for own_seed in seeds) for k, b in enumerate(benchmarks)}
    left_out = {task: number for task, number in left_out.items() if number}
    return Comparison(
        suite=suite,
        benchmarks=tuple(benchmarks),
        rows=tuple(sorted(rows, key=lambda row: (-row.mean.value, row.name))),
        best_expert=None if chosen.expert is None else names[chosen.expert],
        best_expert_chosen_on=None if chosen.expert is None else chosen.split["expert"],
        tsvm=None if chosen.tsvm is None else names[chosen.tsvm],
        hypervolume={
            role: hypervolume(
                [tuple(p) for p, own in zip(points, members, strict=True) if role in ("all", own[0].role)]
            )
            for role in ("all", *dict.fromkeys(own[0].role for own in members))
        },
        seeds=tuple(seeds),
        left_out=left_out,
        notes=write_notes(rows, chosen, contests, seeds, left_out),
    )


def _correct(differences: Differences, methods: Sequence[int], references: Sequence[int]) -> None:
    """Correct the p-values of all methods against one reference, key by key: many methods find chance wins."""
    for j in references:
        family = [i for i in methods if i != j]
        for key in differences[j, j]:
            corrected = holm({i: differences[i, j][key].p for i in family})
            for i, p in corrected.items():
                differences[i, j][key] = replace(differences[i, j][key], p=p)


def _ranks(
    methods: Sequence[int], names: Sequence[str], scores: Sequence[ModelScores], resampled: Resampled
) -> dict[int, int]:
    """Method to its rank; see :func:`tasks.comparison.ranks.shared_ranks`."""

    def losers(leader: int, others: Sequence[int]) -> set[int]:
        found = paired_differences(resampled, scores, (), [(i, leader) for i in others])
        means = {i: found[i, leader]["mean"] for i in others}
        corrected = holm({i: mean.p for i, mean in means.items()})
        return {i for i, mean in means.items() if replace(mean, p=corrected[i]).outcome == "loss"}

    return shared_ranks(sorted(methods, key=lambda i: (-scores[i].mean.value, names[i])), losers)


def _strengths(members: Members, scores: Sequence[ModelScores]) -> dict[str, float]:
    """Score of the strongest expert of each specialty on its own dimension."""
    found: dict[str, float] = {}
    for own, score in zip(members, scores, strict=True):
        specialty = own[0].specialty
        if own[0].role == "expert" and specialty is not None:
            value = score.dimensions[specialty].value
            found[specialty] = max(value, found.get(specialty, value))
    return found


def _dominated(points: Array, i: int) -> bool:
    """Whether some row of ``points`` (M, dimensions) is nowhere worse than row ``i`` and better somewhere."""
    return bool(((points >= points[i]).all(axis=1) & (points > points[i]).any(axis=1)).any())


def _row(
    models: Sequence[ModelSamples],
    scores: ModelScores,
    strengths: dict[str, float],
    *,
    against: dict[str, dict[str, Difference]],
    pareto: bool,
    rank: int | None,
) -> Row:
    model = models[0]
    gaps = {
        task: sum(value is None for own in models for value in own.values[task].values()) for task in scores.benchmarks
    }
    weakest = min(DIMENSIONS, key=lambda d: scores.dimensions[d].value)
    shortfall = {d: scores.dimensions[d].value - strengths[d] for d in DIMENSIONS if d in strengths}
    return Row(
        name=model.name,
        role=model.role,
        specialty=model.specialty,
        digests=tuple(own.digest for own in models),
        settings=model.settings,
        validation=mean_validation(models),
        benchmarks=scores.benchmarks,
        dimensions=scores.dimensions,
        mean=scores.mean,
        minimum=scores.dimensions[weakest],
        weakest=weakest,
        shortfall=shortfall,
        mean_shortfall=sum(shortfall.values()) / len(shortfall) if shortfall else None,
        retention={d: scores.dimensions[d].value / strengths[d] for d in DIMENSIONS if strengths.get(d)},
        **against,
        pareto=pareto,
        partial=any(own.partial for own in models),
        rank=rank,
        unparsed={task: number for task, number in gaps.items() if number},
        chat_template_lost=any(own.chat_template_lost for own in models),
    )
