"""The training process: ``python -m tasks.training.worker`` reads a request on stdin and trains by TRL.

The request is one line. Where stdin closes after it the parent has ended, and so does this process. On stdout it prints
one JSON object a line: ``done`` and ``total`` steps, and at the end ``report`` or ``error``.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging_core.errors import MergeError, RecipeError
from tasks.parent import end_with_parent
from tasks.recipes import validated
from tasks.sources.local import COMPANIONS
from tasks.tables import read_rows
from tasks.training.documents import encode, in_training_order, require_steps
from tasks.training.settings import TrainingSettings
from tasks.training.train import REFUSED


def train(request: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Train one model or adapter as a request asks, and write it to its folder.

    Raises:
        RecipeError: if no document is left to learn from.
    """
    import torch

    settings: TrainingSettings = validated(TrainingSettings, request["settings"], "training")
    torch.set_num_threads(settings.threads)
    base, out = Path(request["base"]), Path(request["out"])
    rows = read_rows(Path(request["data"]))
    if request["stage"] is not None:
        rows = [row for row in rows if row["dataset"] == request["stage"]]
    model, tokenizer, stored = _load(base, settings, request["device"])
    found = [encode(row, tokenizer, settings) for row in rows]
    kept = [document for document in found if document.num_tokens <= settings.max_tokens]
    too_long: dict[str, int] = {}
    for document in found:
        if document.num_tokens > settings.max_tokens:
            too_long[document.dataset] = too_long.get(document.dataset, 0) + 1
    if not kept:
        raise RecipeError(
            f"no document to train on: {len(found)} in the mixture, all longer than {settings.max_tokens} tokens. "
            "Raise max_tokens or num_documents."
        )
    ordered = in_training_order(kept, settings, request["seed"])
    num_steps = require_steps(len(ordered), settings)
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"], is_trainable=True)
    from tasks.training.trainers import build_trainer

    out.mkdir(parents=True, exist_ok=True)
    # In the artifact's own folder, where the next run removes what this one may have to leave.
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        trainer = build_trainer(
            model, tokenizer, ordered, settings, num_steps, request | {"scratch": scratch}, progress
        )
        result = trainer.train()
    _save(trainer.model, base, out, stored, is_adapter=settings.lora is not None)
    return {
        "documents": len(ordered),
        "steps": num_steps,
        "too_long": too_long,
        "mean_loss": round(float(result.training_loss), 6),
        "device": request["device"],
    }


def _load(base: Path, settings: TrainingSettings, device: str) -> tuple[Any, Any, Any]:
    """The model in the precision it is trained in, its tokenizer, and the precision it is stored in."""
    import torch

    from tasks.models import load_language_model

    model, tokenizer = load_language_model(base, "cpu")
    stored = next(model.parameters()).dtype
    model = model.to(torch.bfloat16 if settings.precision == "bfloat16" else torch.float32)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"{base}: its tokenizer has neither a padding nor an end token. Name another base.")
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer, stored


def _save(model: Any, base: Path, out: Path, stored: Any, *, is_adapter: bool) -> None:
    """Write weights as the base's are stored; of what training did not change the base's own files."""
    if is_adapter:
        # Its place in this store is nobody's business, and would change the bytes.
        model.peft_config["default"].base_model_name_or_path = ""
        model.save_pretrained(out, selected_adapters=["default"])
        (out / "README.md").unlink(missing_ok=True)
        return
    model.to(stored).save_pretrained(out)
    for name in COMPANIONS:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)


def _main() -> int:
    # What libraries print goes to stderr; this process speaks on a copy of stdout that they do not know.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(**message: Any) -> None:
            print(json.dumps(message), file=channel, flush=True)

        request = sys.stdin.readline()
        end_with_parent()
        try:
            report = train(json.loads(request), lambda done, total: say(done=done, total=total))
        except MergeError as error:
            say(error=str(error))
            return REFUSED
        say(report=report)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
