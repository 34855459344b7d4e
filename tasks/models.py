"""Loading a model folder with transformers, strictly: nothing missing, nothing run from the folder."""

from pathlib import Path
from typing import Any, Final

from merging_core.adapter import is_adapter
from merging_core.checkpoint import CONFIG
from merging_core.devices import parse_devices
from merging_core.errors import CheckpointError
from merging_core.streamed import require_files

TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a folder with a tokenizer has one or more."""


def load_language_model(folder: Path, device: str, dtype: Any = "auto") -> tuple[Any, Any]:
    """Load a model, ready to be asked, and its tokenizer.

    Args:
        folder: weights, config and tokenizer.
        device: torch device; of several separated by commas, the first.
        dtype: of the weights; ``auto``: as stored.

    Raises:
        RecipeError: if there is no such device.
        CheckpointError: if it is an adapter, config or tokenizer are missing, transformers cannot load the folder, or
            a weight that the model needs is not in it (transformers would draw it at random and only warn), or it is
            streamed from object storage.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    first = parse_devices(device)[0]
    require_files(folder)
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder}: is a PEFT adapter, and a complete model is expected here. Merge a recipe with this one expert "
            "(tripoise merge), and name the folder that it makes."
        )
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(
            f"{folder}: has no {CONFIG} or no tokenizer ({', '.join(TOKENIZERS)}). "
            "Copy them from the base: a model is evaluated as it would be used."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: transformers cannot load it ({reason}). Check config and weights.") from error
    model, report = loaded
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder}: lacks {len(wrong)} weights that its config asks for, first {wrong[:3]}. Fetch the folder again."
        )
    return model.to(first).eval(), tokenizer


def quiet_transformers() -> None:
    """No bars and no hints of transformers: what is worth saying is said by us."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
