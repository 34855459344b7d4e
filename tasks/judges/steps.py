"""Judge steps: generations become scores, and which judge decides which question."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from merging_core.errors import RecipeError
from tasks.generations import read_generations
from tasks.judges.base import Judge, Question
from tasks.judges.classifier import Classifier, ClassifierJudge
from tasks.judges.endpoint import EndpointJudge
from tasks.judges.execution import CodeExecution
from tasks.judges.rule import RuleJudge
from tasks.progress import track
from tasks.scores import Sample, Scored, write_scores
from tasks.steps import Step
from tasks.store import Ref, Store
from tasks.suite import Benchmark, Suite

# Raise it whenever the same verdicts give other scores by a change of ours.
JUDGE_VERSION: Final = 1

AnyJudge = Annotated[RuleJudge | ClassifierJudge | EndpointJudge | CodeExecution, Field(discriminator="name")]
"""Settings of a judge, as recipes and run forms name them."""
Judges = Mapping[Question, AnyJudge]
"""Question to the judge that decides it."""

_REMEDIES: Final[Mapping[Question, str]] = {
    "refusal": "rule, classifier or endpoint",
    "abstention": "rule, classifier or endpoint",
    "hallucination": "classifier or endpoint",
    "harm": "classifier (a guard model) or endpoint",
    "code": "execution, which runs what the model wrote in a sandbox",
}


def default_judges() -> dict[Question, AnyJudge]:
    """Judges that cost nothing and run nothing: the rule judge for refusal and abstention; none for the rest."""
    return {"refusal": RuleJudge(), "abstention": RuleJudge()}


def require_judges(suite: Suite, judges: Judges, setting: str = "judges") -> None:
    """Check, before anything is computed, that every question of a suite has a judge that can decide it.

    Args:
        suite: what is run.
        judges: question to its judge; without an entry nobody decides it.
        setting: how the run calls ``judges``, for messages.

    Raises:
        RecipeError: naming each benchmark whose question nobody decides, and the remedy.
    """
    for question, judge in judges.items():
        if question not in judge.questions:
            raise RecipeError(
                f"{setting}: judge {judge.name} does not decide {question!r}, but "
                f"{', '.join(sorted(judge.questions))}. For {question} name one of: {_REMEDIES[question]}."
            )
    asked = ((one, one.question) for one in suite.benchmarks)
    lacking = [(one, question) for one, question in asked if question is not None and question not in judges]
    if lacking:
        what = "; ".join(f"{one.task} asks about {question}: take {_REMEDIES[question]}" for one, question in lacking)
        raise RecipeError(
            f"suite {suite.name}: no judge for {len(lacking)} of its benchmarks ({what}). "
            f"Name one under {setting}, such as `{setting}: {{{lacking[0][1]}: {{name: ...}}}}` "
            "(docs/judges.md), or leave the benchmark out of the suite."
        )


def judge_step(generations: Ref, benchmark: Benchmark, name: str, judge: AnyJudge, store: Store) -> Step:
    """The step that judges what a model said on one benchmark.

    Args:
        generations: what it said.
        benchmark: names the question.
        name: how titles call the model.
        judge: settings of the judge.
        store: where generations, a judge's own model and its replies lie.

    Returns:
        A step of kind ``scores``: every sample with value, verdict and rationale, the judge's identity beside them.

    Raises:
        RecipeError: if the benchmark has no question, or the judge does not decide it; or its model does not exist.
    """
    question = benchmark.question
    if question is None or question not in judge.questions:
        raise RecipeError(f"benchmark {benchmark.task}: judge {judge.name} does not decide its question {question!r}.")
    ready = _prepared(judge, question, store)
    identity = {
        "version": JUDGE_VERSION,
        "generations": generations.digest,
        "question": question,
        "judge": dict(ready.identity()),
    }
    title = f"judge {question} of {name} on {benchmark.task} ({judge.name})"

    def make(out: Path) -> dict[str, Any]:
        given, asked = read_generations(generations, store)
        with track(title) as progress:
            judgements = ready.judge(question, given, progress)
        samples = tuple(
            Sample(
                one.id,
                one.prompt,
                one.target,
                _response(one.responses),
                judgement.value,
                judgement.verdict,
                judgement.rationale,
            )
            for one, judgement in zip(given, judgements, strict=True)
        )
        scored = Scored(asked=asked, metric=question, samples=samples, judge=ready.identity())
        write_scores(scored, out)
        # The suite's and the model's names stand with the generations.
        return {**store.manifest(generations).details, "model": name, **scored.record()}

    parents = (generations, ready.model) if isinstance(ready, Classifier) else (generations,)
    device = judge.device if isinstance(judge, ClassifierJudge) else ""
    return Step("scores", title, identity, parents, make, device=device)


def _prepared(judge: AnyJudge, question: Question, store: Store) -> Judge:
    """The judge itself, or what it becomes with a model pinned or a place for replies."""
    return judge.prepared(question, store) if isinstance(judge, ClassifierJudge | EndpointJudge) else judge


def _response(responses: tuple[str, ...]) -> str:
    """One response as it is; several under their numbers."""
    if len(responses) == 1:
        return responses[0]
    return "\n\n".join(f"[{number}] {one}" for number, one in enumerate(responses, start=1))
