"""lm-eval's model of a completion endpoint, with a transport of our own.

lm-eval's own prints the key with every failed request, sends ``OPENAI_API_KEY`` to any address, gives every sampled
response to a prompt the same seed, and sums the wrong log-probabilities where a server echoes other tokens than it got.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text

from merging_core.errors import CheckpointError
from tasks.backends import SEED, SUBJECT, Endpoint
from tasks.harness.model import quiet_lm_eval
from tasks.http_api import ApiClient, key_of
from tasks.progress import track


class Completions(LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval has no types
    """Asks an endpoint for the same tokens that transformers would be asked for."""

    def __init__(self, endpoint: Endpoint, folder: Path, max_length: int) -> None:
        key_of(endpoint, SUBJECT)  # so that a missing key is told before any work
        quiet_lm_eval()
        super().__init__(
            model=endpoint.model,
            base_url=endpoint.url,
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            max_length=max_length,
            seed=SEED,
            # Two or more: else lm-eval does not use the transport below.
            num_concurrent=max(2, endpoint.concurrency),
        )
        self.add_bos_token = None
        self._endpoint, self._subject = endpoint, f"{SUBJECT} {endpoint.url}"

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **_: Any) -> Any:
        """Tokens as transformers gives them to a model: with BOS where the tokenizer adds one, never two of them."""
        if not isinstance(string, str):
            return [self.tok_encode(one, add_special_tokens) for one in string]
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.bos_token):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **how)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Complete every prompt; the n-th response to one prompt is drawn with the n-th seed."""
        seen, rounds = Counter[str](), list[list[int]]()
        for place, request in enumerate(requests):
            asked = repr(request.args)
            if seen[asked] == len(rounds):
                rounds.append([])
            rounds[seen[asked]].append(place)
            seen[asked] += 1
        found = [""] * len(requests)
        for number, places in enumerate(rounds):
            self._seed = SEED + number
            replies = super().generate_until([requests[place] for place in places], disable_tqdm)
            for place, text in zip(places, replies, strict=True):
                found[place] = text
        return found

    async def get_batched_requests(
        self,
        requests: Sequence[list[int]],
        cache_keys: Sequence[Any],
        *,
        generate: bool = True,
        ctxlens: Sequence[int] | None = None,
        gen_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> list[list[Any]]:
        """Ask for all, several at a time; the answers in order.

        Raises:
            RecipeError: if the endpoint refuses.
            CheckpointError: if it stays out of reach or broken, or does not answer what it was asked.
        """

        def ask(request: tuple[list[int], int]) -> Any:
            tokens, context = request
            body = self._create_payload([tokens], generate=generate, gen_kwargs=deepcopy(gen_kwargs), seed=self._seed)
            answer = _json(client.post("completions", body), self._subject)
            if generate:
                return client.scrub(self._text(answer, (gen_kwargs or {}).get("until")))
            self._check_echo(answer, tokens)
            return self.parse_logprobs(answer, [tokens], [context])[0]

        asked = list(zip(requests, ctxlens or [0] * len(requests), strict=True))
        with self._client() as client, track(f"ask {self._subject}") as progress:
            return [[answer] for answer in client.each(ask, asked, progress)]

    def _client(self) -> ApiClient:
        return ApiClient(
            self._endpoint,
            SUBJECT,
            refused="Check url, model, max_length and the key in the variable that key_variable names; "
            "it must take token ids, and log-probabilities with echo.",
            failed="Check it, and run again.",
        )

    def _text(self, answer: Mapping[str, Any], until: Any) -> str:
        try:
            [text] = [choice["text"] for choice in answer["choices"]]
        except (KeyError, TypeError, ValueError):
            text = None
        if not isinstance(text, str):
            raise CheckpointError(f"{self._subject}: its answer is not one completion with a text.")
        # A server that leaves the stop sequence in the text, or ignores it, gives the same response.
        return str(postprocess_generated_text(text, [until] if isinstance(until, str) else until or [], None))

    def _check_echo(self, answer: Mapping[str, Any], tokens: list[int]) -> None:
        """The log-probabilities must be those of the tokens that were sent, and of one that was made."""
        try:
            [choice] = answer["choices"]
            logprobs = choice["logprobs"]
            lengths = {len(logprobs["token_logprobs"]), len(logprobs["top_logprobs"])}
            int(choice["index"])  # by which lm-eval sorts
            numbers = all(isinstance(one, float | int) for one in logprobs["token_logprobs"][1:])
        except (KeyError, TypeError, ValueError):
            lengths, numbers = set(), False
        if lengths != {len(tokens) + 1} or not numbers:
            raise CheckpointError(
                f"{self._subject}: was sent {len(tokens)} tokens with echo and asked for one more, and "
                f"gives log-probabilities of {sorted(lengths) or 'none'}. Use a server that echoes prompts with "
                "log-probabilities, such as vLLM, and benchmarks that only generate for any other."
            )


def _json(response: httpx.Response, subject: str) -> Mapping[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise CheckpointError(f"{subject}: its answer is not a JSON object. Check that the url leads to an API.")
    return answer
