"""The training step: one model trained on a mixture, or on one dataset of it, in a process of its own.

Trainers seed and read global generators and share state, so two of them in one process would change each other's bytes;
and a process of its own can be stopped, and gives its memory back.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Final

from merging_core.devices import parse_devices
from merging_core.errors import CheckpointError
from tasks.data.mix import FILE
from tasks.data.recipe import DataRecipe
from tasks.progress import track
from tasks.steps import Step
from tasks.store import Ref, Store

TRAIN_VERSION: Final = 1
"""Raise it whenever the same data give another model by a change of ours."""
REFUSED: Final = 3
# All that the training process sees of the environment: no token, no key.
_ENVIRONMENT: Final = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "PYTORCH_CUDA_ALLOC_CONF"),
)
_QUIET: Final = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def train_step(recipe: DataRecipe, data: Ref, base: Ref, adapter: Ref | None, stage: str | None, store: Store) -> Step:
    """Train ``base`` on a mixture.

    On a CPU the bytes depend on data, base, settings, seed, the packages' versions, the number of threads (a setting)
    and the kind of CPU; on a GPU they may also differ from run to run.

    Args:
        recipe: its training settings, seed and device count.
        data: the mixture.
        base: checkpoint to start from.
        adapter: with LoRA, the adapter to go on with; None for a new one.
        stage: the one dataset of the mixture that is read; None for all of them.
        store: where they lie.
    """
    settings = recipe.training
    packages = ("trl", "transformers", "torch", *(["peft"] if settings.lora else []))
    identity = {
        "version": TRAIN_VERSION,
        "data": data.digest,
        "stage": stage,
        "base": base.digest,
        "adapter": adapter.digest if adapter else None,
        "settings": {name: value for name, value in asdict(settings).items() if name != "paradigm"},
        "seed": recipe.seed,
        # Without the local part, which names the build for a device.
        "packages": {name: version(name).partition("+")[0] for name in packages},
    }
    how = settings.method.upper() + (", LoRA" if settings.lora else "")
    title = f"train on {stage or ', '.join(one.name for one in recipe.datasets)} ({recipe.selection.name}; {how})"

    def make(out: Path) -> dict[str, Any]:
        request = {
            "base": str(store.folder(base)),
            "adapter": str(store.folder(adapter)) if adapter else None,
            "data": str(store.folder(data) / FILE),
            "stage": stage,
            "settings": asdict(settings),
            "seed": recipe.seed,
            "device": str(parse_devices(recipe.device)[0]),
            "out": str(out),
        }
        return run_worker(request, title)

    kind = "adapter" if settings.lora else "checkpoint"
    parents = (data, base, *([adapter] if adapter else []))
    return Step(kind, title, identity, parents, make)


def run_worker(request: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Train in a process of its own, which ends when this one does, however that is; gives what it reports.

    Raises:
        CheckpointError: with the worker's own reason, or the last line it wrote if it broke off.
    """
    # -P: a file named torch.py in the current folder must not be what the worker imports.
    command = [sys.executable, "-P", "-X", "utf8", "-m", "tasks.training.worker"]
    environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ} | _QUIET
    environment["OMP_NUM_THREADS"] = str(request["settings"]["threads"])
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            # Flushed, not closed: the worker ends where this end of the pipe closes.
            process.stdin.flush()
            last = _follow(process.stdout, title)
            code = process.wait()
        finally:
            # Does nothing to a process that has ended; an interrupt leaves none behind.
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        noise.seek(0)
        lines = noise.read().strip().splitlines() or ["no message"]
    if code == REFUSED:
        raise CheckpointError(f"{title}: {last.get('error', lines[-1])}")
    if code or "report" not in last:
        raise CheckpointError(
            f"{title}: the training process ended with code {code} ({lines[-1]}). If it was killed, there is too "
            "little memory: lower batch_size or max_tokens, raise accumulation, or train with lora."
        )
    report: dict[str, Any] = last["report"]
    return report


def _follow(lines: IO[str], title: str) -> dict[str, Any]:
    """Show the progress that a worker prints; gives its last message."""
    last: dict[str, Any] = {}
    with track(title) as progress:
        for line in lines:
            last = json.loads(line)
            if "done" in last:
                progress(last["done"], last["total"])
    return last
