"""The endpoint judge: any OpenAI-compatible chat-completions endpoint, asked carefully and paid once."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from annotated_types import Ge, Gt

from merging_core.digest import digest_of, file_sha256
from merging_core.errors import CheckpointError, RecipeError
from merging_core.settings import STRICT
from tasks.generations import Generation
from tasks.http_api import ApiClient, check_api
from tasks.judges.base import Judgement, Question, combined
from tasks.judges.client import complete
from tasks.judges.kept import REPLIES, KeptReplies
from tasks.judges.reply import read_reply
from tasks.progress import Progress
from tasks.store import Store

# Raise it whenever the same replies are asked for or read otherwise by a change of ours.
ENDPOINT_VERSION: Final = 1
SUBJECT: Final = "judge endpoint"
PROMPTS: Final = Path(__file__).with_name("prompts")
CHARACTERS_PER_TOKEN: Final = 4.0
"""For the estimate of the cost only."""

log = logging.getLogger("tripoise.judges")


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointJudge:
    """Asks a language model behind an OpenAI-compatible chat-completions endpoint, at temperature 0."""

    __pydantic_config__: ClassVar = STRICT
    name: Literal["endpoint"] = "endpoint"
    """A language model behind an OpenAI-compatible endpoint."""
    url: str
    """Base address up to the version, such as http://localhost:8000/v1; without user, password or key."""
    model: str
    """Name of the model at the endpoint."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key; left out: no key is sent. Never the key itself."""
    max_tokens: Annotated[int, Ge(1)] = 512
    """Tokens of a reply, >= 1; a model that thinks first needs more."""
    concurrency: Annotated[int, Ge(1)] = 4
    """Requests at the same time, >= 1."""
    requests_per_minute: Annotated[float, Gt(0)] | None = None
    """Limit of requests in a minute, > 0; left out: none."""
    timeout_s: Annotated[float, Gt(0)] = 120.0
    """Seconds without an answer after which a request is repeated, > 0."""
    retries: Annotated[int, Ge(0)] = 5
    """Repetitions of a request that met a busy or broken server, >= 0."""
    backoff_s: Annotated[float, Gt(0)] = 1.0
    """Wait before the first repetition in seconds, > 0; doubles each time, unless the server says Retry-After."""
    price_per_million_prompt_tokens: Annotated[float, Ge(0)] = 0.0
    """For the estimate of the cost, >= 0, in any currency."""
    price_per_million_reply_tokens: Annotated[float, Ge(0)] = 0.0
    """For the estimate of the cost, >= 0, in the same currency."""
    max_cost: Annotated[float, Gt(0)] | None = None
    """Refuse to start a benchmark whose estimate is above this, > 0; left out: no limit."""

    def __post_init__(self) -> None:
        check_api(self, SUBJECT)
        if self.max_cost is not None and not 0 < self.max_cost < math.inf:
            raise RecipeError(f"{SUBJECT}: max_cost must be a finite number > 0 or left out, got {self.max_cost!r}.")
        prices = (self.price_per_million_prompt_tokens, self.price_per_million_reply_tokens)
        if self.max_cost is not None and not any(prices):
            raise RecipeError(f"{SUBJECT}: max_cost needs the prices of a million prompt and reply tokens.")

    @property
    def questions(self) -> frozenset[Question]:
        """See :class:`tasks.judges.base.Judge`: every question that has a prompt."""
        return frozenset(one for one in get_args(Question) if (PROMPTS / f"{one}.yaml").is_file())

    def prepared(self, question: Question, store: Store) -> "Endpoint":
        """The judge of one question, with the prompt read and a place to keep replies."""
        return Endpoint(self, question, store.root / REPLIES)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint judge that is ready to be asked one question."""

    settings: EndpointJudge
    question: Question
    kept: Path
    """Folder of the replies that were kept."""

    @property
    def questions(self) -> frozenset[Question]:
        """See :class:`tasks.judges.base.Judge`."""
        return frozenset({self.question})

    def identity(self) -> Mapping[str, Any]:
        """See :class:`tasks.judges.base.Judge`. Pace, retries, prices and the key do not change a verdict."""
        path = PROMPTS / f"{self.question}.yaml"
        return {
            "name": self.settings.name,
            "version": ENDPOINT_VERSION,
            "url": self.settings.url.rstrip("/"),
            "model": self.settings.model,
            "max_tokens": self.settings.max_tokens,
            "prompt": {"version": _prompt(self.question)["version"], "sha256": file_sha256(path)},
        }

    def judge(self, question: Question, generations: Sequence[Generation], progress: Progress) -> list[Judgement]:
        """See :class:`tasks.judges.base.Judge`. Equal responses to one prompt are asked about once.

        Raises:
            RecipeError: if the key's variable is not set, the estimate is above ``max_cost``, or the endpoint refuses.
            CheckpointError: if the endpoint fails for good; what it replied so far is kept.
        """
        bodies, wanted = dict[str, dict[str, Any]](), list[list[str]]()
        for generation in generations:
            found = [self.body(generation, response) for response in generation.responses]
            wanted.append([digest_of(body) for body in found])
            bodies |= dict(zip(wanted[-1], found, strict=True))
        with self._client() as client, KeptReplies(self.kept / f"{digest_of(self.identity())}.jsonl") as kept:
            missing = {digest: body for digest, body in bodies.items() if digest not in kept}
            self._estimate(missing.values(), len(bodies) - len(missing))
            refused = self._ask(client, missing, kept, progress, len(bodies))
            replies = refused | {digest: kept[digest] for digest in bodies if digest in kept}
        return [combined([read_reply(question, replies[digest]) for digest in digests]) for digests in wanted]

    def body(self, generation: Generation, response: str) -> dict[str, Any]:
        """The request about one response; the material is JSON, so that nothing in it can pass for our own words."""
        material = {"prompt": generation.prompt, "response": response}
        if generation.target:
            material["reference"] = generation.target
        messages = [
            {"role": "system", "content": _prompt(self.question)["system"]},
            {"role": "user", "content": json.dumps(material, ensure_ascii=False)},
        ]
        settings = self.settings
        return {"model": settings.model, "messages": messages, "temperature": 0, "max_tokens": settings.max_tokens}

    def _client(self) -> ApiClient:
        return ApiClient(
            self.settings,
            SUBJECT,
            refused="Check url, model and the key in the variable that key_variable names.",
            failed="What was replied so far is kept; run again to go on, "
            "with a lower concurrency or requests_per_minute.",
        )

    def _estimate(self, bodies: Any, reused: int) -> None:
        """Say what the requests may cost, and refuse what costs too much."""
        settings, bodies = self.settings, list(bodies)
        characters = sum(len(message["content"]) for body in bodies for message in body["messages"])
        prompt, reply = round(characters / CHARACTERS_PER_TOKEN), settings.max_tokens * len(bodies)
        cost = (
            prompt * settings.price_per_million_prompt_tokens + reply * settings.price_per_million_reply_tokens
        ) / 1_000_000
        text = (
            f"{SUBJECT} {settings.url}: {len(bodies)} requests on {self.question} to {settings.model} "
            f"({reused} replies are kept), about {prompt:,} prompt tokens, at most {reply:,} reply tokens"
        )
        log.info("%s, cost at most about %.4f", text, cost)
        if settings.max_cost is not None and cost > settings.max_cost:
            raise RecipeError(
                f"{text}: would cost up to about {cost:.4f}, max_cost is {settings.max_cost:g}. "
                "Raise max_cost, lower max_tokens, or set a limit of samples."
            )

    def _ask(
        self, client: ApiClient, bodies: Mapping[str, Any], kept: KeptReplies, progress: Progress, total: int
    ) -> dict[str, str]:
        """Keep every reply as it comes; give what came instead of one, which is not kept."""
        refused = dict[str, str]()

        def ask(digest: str) -> None:
            answer = complete(client, bodies[digest])
            if answer.is_reply:
                kept.add(digest, answer.text)
            else:
                refused[digest] = answer.text

        client.each(ask, list(bodies), lambda done, missing: progress(total - missing + done, total))
        if refused and len(refused) == total:
            raise CheckpointError(
                f"{client.subject}: none of {total} answers is a chat completion, one is "
                f"{next(iter(refused.values()))[:300]!r}. Check url, model and max_tokens."
            )
        return refused


@cache
def _prompt(question: Question) -> dict[str, Any]:
    from tasks.recipes import read_yaml

    return read_yaml(PROMPTS / f"{question}.yaml")
