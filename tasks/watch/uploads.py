"""Whether all of a checkpoint is there: what its index and its headers promise, held against the files."""

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, Final

from merging_core.adapter import ADAPTER_WEIGHTS
from merging_core.adapter_config import ADAPTER_CONFIG
from merging_core.checkpoint import CONFIG, INDEX, SINGLE

Head = Callable[[str, int], bytes]
"""Reads the first bytes of a file, by its name."""

_SUFFIX: Final = ".safetensors"
_PICKLED: Final = "pytorch_model*.bin"
_LENGTH_BYTES: Final = 8
# The format's own bound; a longer header is damage, and the resolver says so.
_MOST_HEADER: Final = 100_000_000


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether files of these names are a checkpoint or an adapter, complete or not."""
    return any(name in (CONFIG, INDEX, ADAPTER_CONFIG) or name.endswith(_SUFFIX) for name in names)


def missing_parts(sizes: Mapping[str, int], head: Head) -> str:
    """Say what a checkpoint lacks.

    Args:
        sizes: name of every file to its bytes.
        head: reads the first bytes of one.

    Returns:
        An empty string if nothing is seen to be missing. Damage of another kind is for the resolver to find.
    """
    is_adapter = not {SINGLE, INDEX} & set(sizes) and bool({ADAPTER_CONFIG, ADAPTER_WEIGHTS} & set(sizes))
    weights = [ADAPTER_WEIGHTS if is_adapter else SINGLE]
    if INDEX in sizes:
        try:
            weights = sorted(set(json.loads(head(INDEX, sizes[INDEX]))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{INDEX} is not complete"
    expected = [ADAPTER_CONFIG if is_adapter else CONFIG, *weights]
    if not is_adapter and weights == [SINGLE] and any(fnmatch(name, _PICKLED) for name in sizes):
        return ""  # pickled weights: the resolver refuses them with the remedy
    if lost := [name for name in expected if name not in sizes]:
        return f"lacks {len(lost)} of {len(expected)} files, first {lost[0]}"
    for name in weights:
        if sizes[name] < (promised := _promised_bytes(name, sizes[name], head)):
            return f"{name} has {sizes[name]:,} of {promised:,} bytes"
    return ""


def _promised_bytes(name: str, size: int, head: Head) -> int:
    """Bytes that a safetensors file says it has, as far as its beginning tells."""
    if size < _LENGTH_BYTES:
        return _LENGTH_BYTES
    length = int.from_bytes(head(name, _LENGTH_BYTES), "little")
    if length > _MOST_HEADER or size < _LENGTH_BYTES + length:
        return 0 if length > _MOST_HEADER else _LENGTH_BYTES + length
    try:
        header: dict[str, Any] = json.loads(head(name, _LENGTH_BYTES + length)[_LENGTH_BYTES:])
        ends = [int(one["data_offsets"][1]) for tensor, one in header.items() if tensor != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return 0
    return _LENGTH_BYTES + length + max(ends, default=0)
