"""The code judge: runs programs that a model wrote, with the problem's tests, in the sandbox."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar, Final, Literal

from annotated_types import Ge

from merging_core.errors import RecipeError
from merging_core.settings import STRICT, check_bounds
from tasks.generations import Generation
from tasks.judges.base import Judgement, Question, combined
from tasks.judges.pass_at_k import pass_at_k
from tasks.judges.programs import program
from tasks.progress import Progress
from tasks.sandbox import Limits, Outcome, run_program
from tasks.sandbox.isolation import kind_of_walls

# Raise it whenever the same responses get other verdicts by a change of ours.
EXECUTION_VERSION: Final = 1
# What is appended to a program that passed: whoever passes with it too passes without its tests.
CONTROL: Final = "\nraise AssertionError('a program that holds its tests ends here')\n"

log = logging.getLogger("tripoise.judges")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeExecution:
    """Runs each program with its problem's tests in a sandbox; see docs/code-execution.md for what that keeps out."""

    __pydantic_config__: ClassVar = STRICT
    name: Literal["execution"] = "execution"
    """Runs programs with their tests, in a sandbox."""
    allow: bool = False
    """Must be true: programs that a model wrote are run on this machine, in a sandbox without network and files."""
    k: Annotated[int, Ge(1)] = 1
    """A problem's value is pass@k, >= 1; not above the number of responses to it."""
    limits: Limits = field(default_factory=Limits)
    """What one program may use."""
    num_parallel: Annotated[int, Ge(0)] = 0
    """Programs at the same time, >= 1; 0: one for each core. Too many make slow programs time out."""

    def __post_init__(self) -> None:
        check_bounds(self, "judge execution")
        if self.allow is not True:
            raise RecipeError(
                "judge execution: runs programs that a model wrote on this machine, in a sandbox without network, "
                "files and new processes, and does so only when asked. Set allow: true if you want that "
                "(docs/code-execution.md says what it keeps out), or leave out the benchmarks that ask about code."
            )

    @property
    def questions(self) -> frozenset[Question]:
        """See :class:`tasks.judges.base.Judge`."""
        return frozenset({"code"})

    def identity(self) -> Mapping[str, Any]:
        """See :class:`tasks.judges.base.Judge`. The kind of walls and the number of cores decide nothing."""
        return {
            "name": self.name,
            "version": EXECUTION_VERSION,
            "k": self.k,
            "limits": asdict(self.limits),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        }

    def judge(self, question: Question, generations: Sequence[Generation], progress: Progress) -> list[Judgement]:
        """See :class:`tasks.judges.base.Judge`. The value is pass@k of the problem, for one response 1 or 0.

        Raises:
            RecipeError: if the question is another, a problem has fewer than k responses or no tests, or this machine
                has no sandbox; nothing is run then.
        """
        if question not in self.questions:
            raise RecipeError(f"judge execution: decides code, not {question!r}. Name another judge for it.")
        if short := [one for one in generations if len(one.responses) < self.k]:
            raise RecipeError(
                f"judge execution: pass@{self.k} needs {self.k} or more responses to each problem; {len(short)} of "
                f"{len(generations)} have fewer, first {short[0].id} with {len(short[0].responses)}. "
                f"Set samples: {self.k} or more for the benchmark, or a smaller k."
            )
        programs = [[program(one, response) for response in one.responses] for one in generations]
        log.info("code that a model wrote is run behind %s", kind_of_walls())
        found = list[Judgement]()
        workers = self.num_parallel or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            running = [[pool.submit(self._run, source) for source in sources] for sources in programs]
            try:
                for futures in running:
                    found.append(self._judged([future.result() for future in futures]))
                    progress(len(found), len(generations))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _judged(self, judgements: Sequence[Judgement]) -> Judgement:
        passed = sum(one.value == 1 for one in judgements)
        return replace(combined(judgements), value=pass_at_k(len(judgements), passed, self.k))

    def _run(self, source: str) -> Judgement:
        outcome = run_program(source, self.limits)
        if not outcome.passed:
            return Judgement(0.0, _verdict(outcome), outcome.reason)
        if run_program(source + CONTROL, self.limits).passed:
            return Judgement(0.0, "forged", "passes even when it is made to fail")
        return Judgement(1.0, "passed", "")


def _verdict(outcome: Outcome) -> str:
    """A failure in one word: failed, by a test; timeout; memory; error, by anything else."""
    if outcome.reason == "timed out":
        return "timeout"
    kind = outcome.reason.partition(":")[0]
    return {"AssertionError": "failed", "MemoryError": "memory"}.get(kind, "error")
