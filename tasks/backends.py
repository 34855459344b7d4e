"""What runs a model beside transformers: vLLM where it is installed, or an OpenAI-compatible completion endpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from annotated_types import Ge, Gt

from merging_core.checkpoint import CONFIG
from merging_core.errors import CheckpointError, RecipeError
from merging_core.settings import STRICT
from merging_core.streamed import require_files
from tasks.http_api import check_api
from tasks.names import check_names
from tasks.recipes import read_yaml, validated

SEED: Final = 1234
"""Of every backend; only sampled responses depend on it."""
SUBJECT: Final = "endpoint"


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """An OpenAI-compatible completion endpoint that serves a model: it must take token ids, echo and logprobs."""

    __pydantic_config__: ClassVar = STRICT
    url: str
    """Base address up to the version, such as http://localhost:8000/v1; without user, password or key."""
    model: str
    """Name of the model at the endpoint."""
    revision: str
    """What is served there now, in words of your own, such as a date or a commit. Scores are reused while it stays:
    what an endpoint serves cannot be hashed, so change it whenever the endpoint's model changes."""
    max_length: Annotated[int, Ge(2)] | None = None
    """Tokens that it reads and writes in one request, >= 2; left out: as the config.json beside the tokenizer says."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key; left out: no key is sent. Never the key itself."""
    concurrency: Annotated[int, Ge(1)] = 8
    """Requests at the same time, >= 1."""
    requests_per_minute: Annotated[float, Gt(0)] | None = None
    """Limit of requests in a minute, > 0; left out: none."""
    timeout_s: Annotated[float, Gt(0)] = 300.0
    """Seconds without an answer after which a request is repeated, > 0."""
    retries: Annotated[int, Ge(0)] = 5
    """Repetitions of a request that met a busy or broken server, >= 0."""
    backoff_s: Annotated[float, Gt(0)] = 1.0
    """Wait before the first repetition in seconds, > 0; doubles each time, unless the server says Retry-After."""

    def __post_init__(self) -> None:
        check_api(self, SUBJECT)
        if self.max_length is not None and self.max_length < 2:
            raise RecipeError(
                f"{SUBJECT}: max_length must be a whole number >= 2 or left out, got {self.max_length!r}."
            )
        if not self.revision.strip():
            raise RecipeError(f"{SUBJECT} {self.url}: revision must not be empty. It tells one model from another.")

    @property
    def title(self) -> str:
        """How people call the model."""
        return f"{self.model} at {self.url.rstrip('/')} ({self.revision})"

    def identity(self) -> Mapping[str, Any]:
        """What stands for the content of the model in the identity of its scores, beside the tokenizer's folder."""
        return {
            "url": self.url.rstrip("/"),
            "model": self.model,
            "revision": self.revision,
            "max_length": self.max_length,
        }


def load_endpoint(path: Path) -> Endpoint:
    """Read and check an endpoint file: the fields of :class:`Endpoint` in YAML.

    Raises:
        RecipeError: naming the entry, what was expected and, for a misspelt name, the nearest right one.
    """
    data, subject = read_yaml(path), f"endpoint {path.name}"
    check_names(subject, data, [field.name for field in fields(Endpoint)])
    endpoint: Endpoint = validated(Endpoint, data, subject)
    return endpoint


def endpoint_model(folder: Path, endpoint: Endpoint) -> Any:
    """Give what lm-eval asks in place of a model that transformers loads.

    Args:
        folder: the served model's tokenizer and, unless the endpoint has ``max_length``, config.json.
        endpoint: where the model is served.

    Returns:
        An lm-eval model.

    Raises:
        RecipeError: if a package or the key is missing.
        CheckpointError: if nothing says how much the model reads.
    """
    if lacking := [name for name in ("aiohttp", "requests", "tenacity") if find_spec(name) is None]:
        raise RecipeError(
            f"evaluate: an endpoint needs the packages {', '.join(lacking)}. Install lm-eval with its extra: "
            "pip install 'lm_eval[api]'."
        )
    from tasks.harness.completions import Completions

    return Completions(endpoint, folder, endpoint.max_length or _configured_length(folder))


def _configured_length(folder: Path) -> int:
    try:
        length = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        length = None
    if not isinstance(length, int) or length < 2:
        raise CheckpointError(
            f"{folder}: no {CONFIG} that says max_position_embeddings, and the endpoint does not tell how much it "
            "reads. Set max_length of the endpoint."
        )
    return length


def vllm_model(folder: Path, device: str) -> Any:
    """Load a model folder with vLLM, as an lm-eval model.

    Raises:
        RecipeError: if vLLM is not installed, or the device is not the first visible GPU.
        CheckpointError: if the weights are streamed from object storage.
    """
    # No torch here: a process that has touched a GPU cannot start vLLM's.
    if device.split(",")[0].strip() not in ("cpu", "cuda", "cuda:0"):
        raise RecipeError(
            f"evaluate: vLLM takes the first visible GPU, not {device!r}. Say CUDA_VISIBLE_DEVICES=1 or the like in "
            "the environment, and leave the device out."
        )
    if find_spec("vllm") is None:
        raise RecipeError(
            "evaluate: backend vllm needs the package vllm, which needs a GPU. Install it (pip install vllm), or take "
            "backend transformers."
        )
    require_files(folder)
    from tasks.harness.vllm import load

    return load(folder, SEED)
