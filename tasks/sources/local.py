"""Local folders: which files are a checkpoint's content, and their sha256, remembered while they do not change."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from merging_core.adapter import ADAPTER_WEIGHTS, adapter_weights, is_adapter
from merging_core.adapter_config import ADAPTER_CONFIG, AdapterConfig
from merging_core.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint, weight_files
from merging_core.errors import CheckpointError
from merging_core.streamed import is_note, read_note, shard_name
from tasks.progress import Progress
from tasks.sources import Pinned

COMPANIONS: Final = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a checkpoint besides its weights that change what the model answers; custom code is not among them."""

SAFETENSORS: Final = (SINGLE, INDEX)
"""Names of the weight file of a checkpoint, and of the index where there are several."""
ADAPTER: Final = (ADAPTER_WEIGHTS, f"{ADAPTER_WEIGHTS}.index.json")

_BLOCK: Final = 1 << 22
_THREADS: Final = 4


def pin(folder: Path, name: str, origin: str, memo: Path, progress: Progress) -> Pinned:
    """Check that a folder is a complete checkpoint or an adapter and take the sha256 of its content files.

    Args:
        folder: the checkpoint's or adapter's folder.
        name: how messages call it: the source as the user wrote it.
        origin: where it came from, for people.
        memo: folder of the remembered sha256; a file is read again only if its size, times or inode changed.
        progress: called with bytes hashed so far and bytes in all.

    Raises:
        CheckpointError: if the folder or a file is missing, damaged or pickled, or changes meanwhile.
    """
    files = content_files(folder, name)
    records = _hash_all(files, name, memo, progress)
    content = {
        shard_name(path): read_note(path).sha256 if is_note(path) else records[path.name]["sha256"] for path in files
    }
    return Pinned(folder.resolve(), records, content, origin)


def content_files(folder: Path, name: str) -> list[Path]:
    """The files that make a checkpoint or an adapter what it is, after a check that they fit together.

    Raises:
        CheckpointError: if they do not, or if one is missing or damaged.
    """
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "~", "/")):
        raise CheckpointError(f"{name}: no folder {folder}. Check the path; a repository of the Hub is hf://{name}.")
    if is_adapter(folder):
        AdapterConfig(folder, name)
        weights = [adapter_weights(folder, name), folder / ADAPTER_CONFIG]
        Checkpoint(folder, name, weights[:1]).close()
        return [*weights, *_companions(folder)]
    Checkpoint(folder, name=name).close()
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{name}: {folder} holds no {CONFIG}. Copy it from where the weights came from.")
    return [*weight_files(folder, name), *_companions(folder)]


def weight_names(folder: Path, weights: tuple[str, str]) -> list[str]:
    """Names of the weight files, present or not: those of the index if there is one, else the single one's.

    Args:
        folder: holds the index, if there is one.
        weights: names of the single file and of the index, such as :data:`SAFETENSORS`.

    Raises:
        CheckpointError: if the index cannot be read.
    """
    single, index = weights
    if not (folder / index).exists():
        return [single]
    try:
        return sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / index}: is not an index of shards ({error!r}). Name another revision."
        ) from error


def _companions(folder: Path) -> list[Path]:
    return [folder / companion for companion in (*COMPANIONS, INDEX) if (folder / companion).exists()]


def _hash_all(files: list[Path], name: str, memo: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    total = sum(path.stat().st_size for path in files)
    done, lock = 0, threading.Lock()

    def advance(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress(done, total)

    with _remembered(memo, files[0].resolve().parent) as known, ThreadPoolExecutor(_THREADS) as pool:
        try:
            records = list(pool.map(lambda path: _record(path, known, advance), files))
        except OSError as error:
            raise CheckpointError(
                f"{name}: {error.filename} cannot be read ({error.strerror}). Check its permissions."
            ) from error
    return {path.name: record for path, record in sorted(zip(files, records, strict=True))}


def _record(path: Path, known: dict[str, list[Any]], advance: Callable[[int], None]) -> dict[str, Any]:
    real = str(path.resolve())
    stamp = _stamp(path)
    entry = known.get(real)
    if entry and entry[:-1] == stamp:
        advance(stamp[0])
        sha256 = entry[-1]
    else:
        sha256 = _sha256(path, advance)
        if _stamp(path) != stamp:
            raise CheckpointError(f"{path}: changed while it was read. Wait until nobody writes it and run again.")
        known[real] = [*stamp, sha256]
    return {"size": stamp[0], "sha256": sha256, "mtime_ns": stamp[1]}


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    # The time of the last status change notices an edit whose author put the old modification time back.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
            advance(len(block))
    return state.hexdigest()


@contextlib.contextmanager
def _remembered(memo: Path, folder: Path) -> Iterator[dict[str, list[Any]]]:
    """Lend what is known of the files of ``folder``, by real path; write it back if the block added something.

    It is written even when the block fails: what was hashed until then stays true.
    """
    path = memo / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    known: dict[str, list[Any]] = {}
    # A memo that is missing or cannot be read only costs time.
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text()))
    before = dict(known)
    try:
        yield known
    finally:
        if known != before:
            memo.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
            partial.write_text(json.dumps({real: entry for real, entry in known.items() if os.path.exists(real)}))
            os.replace(partial, path)
