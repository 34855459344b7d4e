"""Pickled weights to safetensors: read in a process of their own, without running what a pickle asks for.

``python -m tasks.convert FOLDER OUT`` is that process. It says on stdout, in one line, why it refused, and ends where
its stdin closes.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from merging_core.checkpoint import CONFIG, DTYPES, TensorInfo
from merging_core.compatibility import EMBEDDINGS, HEAD, same_bits
from merging_core.errors import CheckpointError, MergeError, RecipeError
from merging_core.writer import write_checkpoint
from tasks.parent import end_with_parent
from tasks.sources.local import COMPANIONS
from tasks.store import flush_folder, remove, require_free

_SINGLE: Final = "pytorch_model.bin"
_INDEX: Final = "pytorch_model.bin.index.json"
# All that the reading process sees of the environment: no token, no key.
_ENVIRONMENT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONPATH", "TMPDIR")
_REFUSED: Final = 3


def convert(source: str, out: Path) -> None:
    """Write the pickled weights of a checkpoint as safetensors, with its config and tokenizer beside them.

    Tensors keep their names, dtypes and bits. Tied weights are written once where the config says that they are
    tied, else as separate copies. ``out`` appears by one rename when all of it is written.

    Args:
        source: a local folder or ``hf://org/name@revision`` with ``pytorch_model.bin`` or its shards.
        out: folder to be made; may exist if it is empty.

    Raises:
        RecipeError: if ``out`` is not empty or its parent does not exist, or ``source`` is not of a known form.
        CheckpointError: if there are no such weights, they contain code, are damaged, or hold more than tensors.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: exists and is not an empty folder. Name a new folder; nothing was written.")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"{out}: no folder {out.absolute().parent}. Make it first; nothing was written.")
    folder = _source_folder(source)
    pickle_files(folder, source)
    partial = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        _run_reader(folder, partial, source)
        for name in (*COMPANIONS, "README.md"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, partial / name)
        flush_folder(partial)
        os.rename(partial, out)
    finally:
        remove(partial)


def pickle_files(folder: Path, name: str) -> list[Path]:
    """The pickled weight files of a folder that also holds a config, sorted by name.

    Raises:
        CheckpointError: if one is missing.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{name}: no {CONFIG} in {folder}. Name a folder with a config and {_SINGLE}.")
    single, index = (folder / _SINGLE).exists(), (folder / _INDEX).exists()
    if single and index:
        raise CheckpointError(f"{name}: holds both {_SINGLE} and {_INDEX}; one of them is stale. Remove that one.")
    if single:
        return [folder / _SINGLE]
    if not index:
        raise CheckpointError(f"{name}: {folder} holds no {_SINGLE} or {_INDEX}; there is nothing to convert.")
    files = [folder / file for file in sorted(set(_weight_map(folder).values()))]
    if lost := [file.name for file in files if file.parent != folder or not file.exists()]:
        raise CheckpointError(f"{name}: {len(lost)} of {len(files)} shards are missing, first {lost[0]!r}. Fetch them.")
    return files


def load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of one pickled file by name, mapped from disk where its format allows; no code of it is run.

    Raises:
        CheckpointError: if it contains code, is damaged, or holds more than tensors.
    """
    try:
        # Files that are not archives are of torch < 1.6 (or cut short) and cannot be mapped.
        value = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # bytes that were tampered with can make the unpickler fail in any way
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{file.name} contains code ({found[1]}) and was refused; nothing of it was run. "
                "Get the weights as safetensors from their author, or a state dict of tensors only."
            ) from None
        raise CheckpointError(
            f"{file.name} cannot be read as pickled tensors ({type(error).__name__}). "
            "The copy is cut short or damaged; fetch it again."
        ) from None
    if isinstance(value, dict) and list(value) == ["state_dict"]:
        value = value["state_dict"]
    return _tensors_only(value, file)


def _source_folder(source: str) -> Path:
    if "://" not in source:
        return Path(source).expanduser().absolute()
    if not source.startswith("hf://"):
        raise RecipeError(f"{source}: expected a local folder or hf://org/name@revision.")
    from tasks.sources.hub import PICKLED, fetch

    return fetch(source, PICKLED).folder


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _INDEX}: is not an index of shards ({error!r}). Fetch it again.") from error


def _run_reader(folder: Path, partial: Path, name: str) -> None:
    # -P: a file named torch.py in the current folder must not be what the reader imports.
    command = [sys.executable, "-P", "-X", "utf8", "-m", "tasks.convert", str(folder), str(partial)]
    environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
    theirs, ours = os.pipe()
    # The reader ends where this end closes, as it does where this process is killed.
    with open(theirs), open(ours, "wb"):
        done = subprocess.run(command, env=environment, stdin=theirs, capture_output=True, text=True)
    if done.returncode == _REFUSED:
        raise CheckpointError(f"{name}: {done.stdout.strip()}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"{name}: the process that reads the pickle ended with code {done.returncode} ({last}). "
            "If it was killed, there is too little memory; else the file is damaged: fetch it again."
        )


def _read_and_write(folder: Path, out: Path) -> None:
    """The reading process: load every file, check all of it, write one tensor at a time."""
    state: dict[str, Tensor] = {}
    for file in pickle_files(folder, str(folder)):
        for name, tensor in load_pickle(file).items():
            if name in state:
                raise CheckpointError(f"tensor {name!r} is in two shards. Remove the stale shard.")
            state[name] = tensor
    if (folder / _INDEX).exists():
        _compare(set(_weight_map(folder)), set(state))
    if json.loads((folder / CONFIG).read_text()).get("tie_word_embeddings") is True and _repeats_embedding(state):
        del state[HEAD]
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    require_free(out, sum(info.num_bytes for info in infos.values()), "the converted checkpoint")
    write_checkpoint(out, infos, state.__getitem__)


def _tensors_only(value: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{file.name} holds a {type(value).__name__}, expected names and tensors.")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file.name}: entry {name!r} is a {type(tensor).__name__}, expected a tensor. "
                "Save the model's state_dict() alone."
            )
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{file.name}: {name!r} is {tensor.layout} {tensor.dtype}, which safetensors cannot hold."
            )
    return value


def _compare(indexed: set[str], found: set[str]) -> None:
    if odd := sorted(indexed ^ found):
        raise CheckpointError(f"index and shards differ in {len(odd)} tensors, first {odd[:3]}. Fetch both again.")


def _repeats_embedding(state: Mapping[str, Tensor]) -> bool:
    """Whether the output head has the bits of the embedding, from which a tied model makes it."""
    head = state.get(HEAD)
    embeddings = [tensor for name, tensor in state.items() if name.endswith(EMBEDDINGS)]
    return head is not None and any(same_bits(head, embedding) for embedding in embeddings)


def _main() -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end_with_parent()
    try:
        _read_and_write(Path(sys.argv[1]), Path(sys.argv[2]))
    except MergeError as error:
        print(error)
        return _REFUSED
    except OSError as error:
        print(f"{sys.argv[2]} cannot be written ({error.strerror}). Name a folder on another disk.")
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
