"""The calibration step: run one expert over its texts, and keep what RegMean and Fisher merging weigh it by."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from merging_core.calibration import CalibrationSettings, write_calibration
from merging_core.checkpoint import Checkpoint
from merging_core.compatibility import own_tensors
from merging_core.digest import digest_of
from merging_core.errors import CheckpointError, NumericalError, RecipeError
from merging_core.methods.base import CalibratedMethod
from merging_core.recipe import Expert, Recipe
from merging_core.threads import one_torch_thread
from tasks.models import load_language_model
from tasks.moments import gram_matrices, squared_gradients
from tasks.progress import track
from tasks.sources.mini3h import mini3h_texts
from tasks.steps import Step
from tasks.store import Ref, Store

# Raise it, with a bold line in CHANGELOG.md, whenever the same inputs give other values.
CALIBRATE_VERSION: Final = 1

# The last token of a text is only predicted, never read.
_FEWEST: Final = 2
_REMEDY: Final = (
    'Add `calibration: texts.jsonl` (lines of {"text": ...}) or a .txt file (one text a line) to the expert, '
    "or choose a method that needs no texts."
)


def require_texts(recipe: Recipe) -> None:
    """Read the calibration texts of all experts, if the method asks for them, before anything is computed.

    Raises:
        RecipeError: as in :func:`calibration_texts`.
    """
    if isinstance(recipe.method, CalibratedMethod):
        for expert in recipe.experts:
            calibration_texts(expert, recipe.method.calibration.num_examples)


def calibration_texts(expert: Expert, number: int) -> list[str]:
    """The first texts of an expert, at most ``number``: of its file, or of what a mini-3H role reads in training.

    Raises:
        RecipeError: naming the expert, if it has none, or its file is missing, empty or of another form.
    """
    where = f"expert {expert.name!r}"
    if expert.calibration is None:
        if expert.source.startswith("mini3h://"):
            return mini3h_texts(expert.source, number)
        raise RecipeError(f"{where}: the method weighs experts by what they do on texts, and it has none. {_REMEDY}")
    path = Path(expert.calibration).expanduser()
    where = f"{where}: calibration {expert.calibration}"
    if path.suffix not in (".jsonl", ".txt"):
        raise RecipeError(f"{where}: expected a .jsonl or a .txt file. {_REMEDY}")
    try:
        with path.open(encoding="utf-8") as file:
            texts = [_text(line, path.suffix, f"{where}, line {at}") for at, line in enumerate(islice(file, number), 1)]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{where}: cannot be read ({reason}). Check the path.") from error
    if not texts:
        raise RecipeError(f"{where}: holds no text. {_REMEDY}")
    return texts


def _text(line: str, suffix: str, where: str) -> str:
    text: Any = line.rstrip("\n")
    if suffix == ".jsonl":
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise RecipeError(f'{where}: expected a JSON object {{"text": ...}} ({error!r}).') from error
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"{where}: expected a text that is not empty. Remove the line.")
    return text


def calibrate_step(expert: Expert, checkpoint: Ref, settings: CalibrationSettings, store: Store, device: str) -> Step:
    """Measure one expert on its texts; depends on the checkpoint, the texts' content and the settings alone.

    The model runs in float32, text by text; a text is encoded as the tokenizer does by itself, special tokens included.
    On another device the last bits of the values may differ, which their identity ignores, as that of scores does; on
    the CPU they do not depend on the number of threads.

    Args:
        expert: names the texts.
        checkpoint: its model.
        settings: what is measured.
        store: where the model lies.
        device: torch device; of several, separated by commas, the first.

    Raises:
        RecipeError: as in :func:`calibration_texts`. The step itself refuses a model whose parameters have other names
            than in its checkpoint and, for ``gram``, one with matrices that are no weights of linear layers.
    """
    texts = calibration_texts(expert, settings.num_examples)
    title = f"calibrate {expert.name}"

    def make(out: Path) -> dict[str, Any]:
        folder, where = store.folder(checkpoint), f"expert {expert.name!r}"
        with one_torch_thread(), Checkpoint(folder, where) as opened:
            model, tokenizer = load_language_model(folder, device, torch.float32)
            _check_names(model, opened, settings.kind)
            examples, num_cut = _encoded(texts, model, tokenizer, settings.max_tokens, where)
            measure = gram_matrices if settings.kind == "gram" else squared_gradients
            with track(title) as progress:
                rms = write_calibration(out, measure(model, examples, progress), where)
        if settings.kind == "fisher" and rms == 0:
            raise NumericalError(f"{where}: no text has a gradient. Name texts that it does not know by heart.")
        num_tokens = sum(map(len, examples))
        return {"num_texts": len(texts), "num_cut": num_cut, "num_tokens": num_tokens, "rms": rms, "device": device}

    identity = {
        "version": CALIBRATE_VERSION,
        "expert": checkpoint.digest,
        "texts": digest_of(texts),
        "settings": asdict(settings),
    }
    return Step("calibration", title, identity, (checkpoint,), make, device=device)


def _check_names(model: nn.Module, checkpoint: Checkpoint, kind: str) -> None:
    """Refuse a model whose tensors are not those of its checkpoint, or whose matrices RegMean would pass over."""
    stored = {name: info for name, info in own_tensors(checkpoint).items() if info.dtype.is_floating_point}
    renamed = [
        name
        for name, parameter in model.named_parameters()
        if name not in stored or stored[name].shape != tuple(parameter.shape)
    ]
    if renamed:
        raise CheckpointError(
            f"{checkpoint.name}: transformers stores {len(renamed)} parameters under other names than the checkpoint, "
            f"first {renamed[:3]}; what is measured could not be assigned. Choose a method that needs no texts."
        )
    known = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    odd = [name for name, info in stored.items() if len(info.shape) > 1 and name not in known]
    if kind == "gram" and odd:
        raise RecipeError(
            f"{checkpoint.name}: regmean needs the inputs of every matrix, and {len(odd)} are not weights of linear "
            f"layers, first {odd[:3]}. Choose fisher, or a method that needs no texts."
        )


def _encoded(
    texts: Sequence[str], model: nn.Module, tokenizer: Any, max_tokens: int, where: str
) -> tuple[list[Tensor], int]:
    """Token ids of every text on the model's device, and how many texts were cut."""
    most = min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    if short := [text for text, ids in zip(texts, encoded, strict=True) if len(ids) < _FEWEST]:
        raise RecipeError(f"{where}: texts must have {_FEWEST} tokens or more, {short[0]!r} has fewer. Remove it.")
    device = next(model.parameters()).device
    cut = sum(len(ids) > most for ids in encoded)
    return [torch.tensor(ids[:most], device=device) for ids in encoded], cut
