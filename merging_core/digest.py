"""Identity of what was computed: canonical JSON and sha256 over it."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22


def canonical_json(value: Any) -> str:
    """Write ``value`` as JSON with one spelling: sorted names, no blanks, ASCII.

    Args:
        value: mappings with string names, lists, tuples, strings, integers, booleans, None and finite floats.
            A float with an integral value is written as that integer, so ``1`` and ``1.0`` are the same setting.

    Returns:
        The text; equal values give equal texts in every process and on every machine.

    Raises:
        TypeError: for anything else, sets included (their order is not stable), and for NaN and infinity.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Sha256 of :func:`canonical_json`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes, read in blocks, as 64 hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"canonical JSON: numbers must be finite, got {value!r}.")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"canonical JSON: names must be strings, got {bad[0]!r}.")
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"canonical JSON: cannot write a {type(value).__name__}.")
