"""The flow ``benchmark``: several methods, one suite; scales chosen on validation, everything reported on test."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.parameters import Bench
from flows.pipeline import Exam, Kitchen, pin
from flows.reported import reported
from flows.shown import show_plan
from merging_core.recipe import Recipe
from tasks.calibrate import require_texts
from tasks.comparison import Role
from tasks.merge import merge_title
from tasks.orchestration import TASK_RUNNER
from tasks.recipes import recipe_yaml
from tasks.reporting import Entry, best_on_validation, report_step
from tasks.steps import Runner
from tasks.store import Ref


def _run_name() -> str:
    bench = Bench.model_validate(flow_run.parameters["bench"])
    seeds = f" · {len(bench.seeds)} seeds" if bench.seeds else ""
    return f"{bench.title} · {len(bench.methods)} methods · {len(bench.experts)} experts{seeds}"


@flow(name="benchmark", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def benchmark(bench: Bench) -> dict[str, Any]:
    """You get a leaderboard of all methods beside base, experts and data mixtures, and a report."""

    def compose(run: Runner) -> Ref:
        tables = _tables(bench, run)
        show_plan(lambda planner: compare_methods(bench, planner), run.store)
        return _compare(bench, tables, run)

    return reported(compose)


def compare_methods(bench: Bench, run: Runner) -> Ref:
    """The report on all methods of a benchmark, over all its seeds."""
    return _compare(bench, _tables(bench, run), run)


def _compare(bench: Bench, tables: "list[_Table]", run: Runner) -> Ref:
    entries = [entry for table in tables for entry in table.references()]
    chosen: list[dict[str, _Trial]] = [{} for _ in tables]
    for name in bench.candidates():
        tried = [table.try_all(name) for table in tables]
        # One scale for a method: the best mean over all seeds.
        validation = [[ref for one in same for ref in one.validation] for same in zip(*tried, strict=True)]
        best = best_on_validation(validation, tables[0].exam.suite, run.store)
        for own, trials in zip(chosen, tried, strict=True):
            own[name] = trials[best]
    merged = [table.entries(own) for table, own in zip(tables, chosen, strict=True)]
    entries += [entry for of_method in zip(*merged, strict=True) for entry in of_method]
    second = [
        opinion
        for table in tables
        for opinion in table.exam.second_opinions(e for e in entries if e.seed == table.seed)
    ]
    interference = tables[0].kitchen.compare()
    step = report_step(bench.title, tables[0].exam.suite, entries, interference, run.store, second)
    [report] = run.build("report", "report", [step])
    return report


def _tables(bench: Bench, run: Runner) -> "list[_Table]":
    """One table for each seed; all sources of all seeds are resolved at the same time."""
    exam, seeds = Exam.of(bench, run), bench.by_seed()
    for own in seeds.values():
        for recipes in own.candidates().values():
            require_texts(recipes[0])
    bases = pin({own.base: own.base for own in seeds.values()}, run)
    # Mixtures first: where sources are trained, they take longest.
    wanted = [one.source for own in seeds.values() for one in own.mixtures]
    wanted += [one.source for own in seeds.values() for one in own.experts]
    pinned = pin({source: source for source in wanted}, run)
    tables = []
    for seed, own in seeds.items():
        tuned = {one.name: pinned[one.source] for one in own.experts}
        # A generated world is that of the seed; the suite's own where no seeds are given.
        suite = replace(exam.suite, world_seed=seed) if bench.seeds and exam.suite.world else exam.suite
        called = f", seed {seed}" if bench.seeds else ""
        tables.append(
            _Table(
                bench=own,
                seed=seed,
                exam=replace(exam, suite=suite, called=called),
                kitchen=Kitchen(
                    run,
                    bases[own.base],
                    tuned,
                    own.execution.device,
                    own.tokenizer,
                    own.execution.timeout_minutes,
                ),
                mixtures={one.name: pinned[one.source] for one in own.mixtures},
            )
        )
    return tables


@dataclass(frozen=True, slots=True)
class _Trial:
    """One recipe of a method in one seed, merged and scored on validation."""

    recipe: Recipe
    model: Ref
    validation: list[Ref]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """What is compared within one seed."""

    bench: Bench
    seed: int
    exam: Exam
    kitchen: Kitchen
    mixtures: dict[str, Ref]

    def references(self) -> list[Entry]:
        """Base, experts and mixtures."""
        experts = {one.name: self.kitchen.complete(one, self.bench.base) for one in self.bench.experts}
        models: list[tuple[str, Role, Ref]] = [("base", "base", self.kitchen.sources.base)]
        models += [(name, "expert", ref) for name, ref in experts.items()]
        models += [(name, "mixture", ref) for name, ref in self.mixtures.items()]
        test = self.exam.scores_of([(ref, name) for name, _, ref in models])
        tuned = self.exam.scores_of([(ref, name) for name, ref in experts.items()], "validation")
        validation = dict(zip(experts, tuned, strict=True))
        return [
            Entry(name, role, ref, scores, validation.get(name, []), seed=self.seed)
            for (name, role, ref), scores in zip(models, test, strict=True)
        ]

    def try_all(self, name: str) -> list[_Trial]:
        """Merge by every recipe of a method and score each on validation."""
        recipes = self.bench.candidates()[name]
        merged = [(self.kitchen.merge(recipe), merge_title(recipe)) for recipe in recipes]
        return [
            _Trial(recipe, model, validation)
            for recipe, (model, _), validation in zip(
                recipes, merged, self.exam.scores_of(merged, "validation"), strict=True
            )
        ]

    def entries(self, chosen: Mapping[str, _Trial]) -> list[Entry]:
        """Every method at its chosen scale, on test."""
        test = self.exam.scores_of([(trial.model, name) for name, trial in chosen.items()])
        return [
            Entry(name, "merged", trial.model, own, trial.validation, recipe_yaml(trial.recipe), seed=self.seed)
            for (name, trial), own in zip(chosen.items(), test, strict=True)
        ]
