"""Whether checkpoints can be merged: every mismatch is found before anything is computed."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from merging_core.checkpoint import Checkpoint, TensorInfo, read_json
from merging_core.errors import CheckpointError, IncompatibleError

# Entries of config.json that change what the weights mean although no shape shows it.
ARCHITECTURE: Final = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "quantization_config",
)
_HEAD: Final = "lm_head.weight"
_EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_SHOWN: Final = 3


def check_compatible(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> dict[str, TensorInfo]:
    """Compare every expert with the base: tensor names, shapes, architecture and vocabulary.

    Args:
        base: the checkpoint all experts started from.
        experts: by name.

    Returns:
        The tensors to merge, by name, as the base stores them. An output head that only repeats a tied embedding is
        left out: loading ties it again.

    Raises:
        IncompatibleError: listing all mismatches of all experts, each with its first three names and the count.
    """
    if "quantization_config" in base.config:
        raise IncompatibleError(
            f"{base.name}: is quantized, and sums of quantized weights mean nothing. Merge the unquantized checkpoints."
        )
    expected = own_tensors(base)
    found = [problem for name, expert in experts.items() for problem in _mismatches(base, expected, name, expert)]
    if found:
        raise IncompatibleError(
            "; ".join(found)
            + ". All checkpoints must be fine-tuned from the same base, with its architecture and vocabulary."
        )
    return expected


def own_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """A checkpoint's tensors without an output head that repeats the tied embedding.

    Raises:
        IncompatibleError: if the config ties the head to the embedding but the file stores two different tensors.
    """
    tensors = dict(checkpoint.tensors)
    embedding = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    if checkpoint.config.get("tie_word_embeddings") and _HEAD in tensors and embedding:
        if not torch.equal(checkpoint.load(_HEAD), checkpoint.load(embedding)):
            raise IncompatibleError(
                f"{checkpoint.name}: config.json ties {_HEAD} to {embedding}, but the two differ. "
                "Set tie_word_embeddings to false if the head was trained, or remove it."
            )
        del tensors[_HEAD]
    return tensors


def vocabulary_size(checkpoint: Checkpoint) -> int | None:
    """``vocab_size`` of the config, or of its language model where that is nested; None if neither says."""
    size = checkpoint.config.get("vocab_size", (checkpoint.config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id, added tokens included, from ``tokenizer.json``; None if the folder has no such file.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    stored = read_json(path)
    try:
        vocab = stored.get("model", {}).get("vocab", {})
        # A unigram model lists [token, score] pairs, and a token's id is its position.
        tokens = dict(vocab) if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
        tokens.update({entry["content"]: entry["id"] for entry in stored.get("added_tokens", [])})
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer ({error!r}). Fetch the file again.") from error
    return tokens


def _mismatches(base: Checkpoint, expected: Mapping[str, TensorInfo], name: str, expert: Checkpoint) -> Iterable[str]:
    tensors = own_tensors(expert)
    lost = [tensor for tensor in expected if tensor not in tensors]
    extra = [tensor for tensor in tensors if tensor not in expected]
    shared = [tensor for tensor in expected if tensor in tensors]
    reshaped = [tensor for tensor in shared if expected[tensor].shape != tensors[tensor].shape]
    retyped = [
        tensor
        for tensor in shared
        if expected[tensor].dtype.is_floating_point != tensors[tensor].dtype.is_floating_point
    ]
    yield from _named(f"expert {name!r} lacks", lost, "tensors of the base")
    yield from _named(f"expert {name!r} has", extra, "tensors that the base lacks")
    yield from _named(
        f"expert {name!r} has",
        reshaped,
        "tensors of another shape",
        lambda tensor: f"{tensor} {list(tensors[tensor].shape)} instead of {list(expected[tensor].shape)}",
    )
    yield from _named(
        f"expert {name!r} has",
        retyped,
        "tensors of another kind",
        lambda tensor: f"{tensor} {tensors[tensor].dtype} instead of {expected[tensor].dtype}",
    )
    yield from (
        f"config.json of expert {name!r} has {key} {_plain(_entry(expert.config, key))}, "
        f"that of the base {_plain(_entry(base.config, key))}"
        for key in ARCHITECTURE
        if _differ(base.config, expert.config, key)
    )
    if _rope_scaling(base.config) != _rope_scaling(expert.config):
        yield (
            f"config.json of expert {name!r} has rope_scaling {_rope_scaling(expert.config) or 'none'}, "
            f"that of the base {_rope_scaling(base.config) or 'none'}"
        )
    ours, theirs = vocabulary(base.folder), vocabulary(expert.folder)
    if ours is not None and theirs is not None and ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        yield from _named(f"the vocabulary of expert {name!r} differs in", differing, "tokens", repr)


def _named(subject: str, names: list[str], what: str, show: Callable[[str], str] = str) -> Iterable[str]:
    if names:
        yield f"{subject} {len(names)} {what}, first {', '.join(show(name) for name in names[:_SHOWN])}"


def _differ(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    # An entry that one file leaves out has the architecture's default, which the core does not know.
    if key == "quantization_config":
        return (key in ours) != (key in theirs)
    one, other = _entry(ours, key), _entry(theirs, key)
    return one is not None and other is not None and bool(one != other)


def _entry(config: Mapping[str, Any], key: str) -> Any:
    # transformers 5 nests rope_theta, older releases do not.
    return config.get(key, (config.get("rope_parameters") or {}).get(key))


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are stretched; nothing for the default, which releases of transformers write differently."""
    stated = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = stated.pop("type", stated.pop("rope_type", "default"))
    stated.pop("rope_theta", None)
    stated.pop("rope_type", None)
    return {} if kind == "default" else {"rope_type": kind, **stated}


def _plain(value: Any) -> str:
    return "none" if value is None else str(value) if not isinstance(value, dict) else "set"
