"""The folder of a model that is served elsewhere: its tokenizer, chat template and config, without weights."""

from hashlib import sha256
from pathlib import Path
from typing import Final

from merging_core.errors import CheckpointError, RecipeError
from tasks.models import TOKENIZERS
from tasks.sources.local import COMPANIONS
from tasks.steps import Step

KIND: Final = "tokenizer"
"""A kind of its own: it is no checkpoint, so that nothing merges or publishes it for one."""


def tokenizer_step(source: str) -> Step:
    """The step that copies the tokenizer of a local folder, and what stands beside it, into the store.

    Its identity covers names and contents of these files. Weights in the folder are left where they are: they need
    not be those that are served.

    Raises:
        RecipeError: if the source is not a local folder.
        CheckpointError: if the folder has no tokenizer, or a file of it cannot be read.
    """
    folder = Path(source).expanduser()
    if "://" in source or not folder.is_dir():
        raise RecipeError(
            f"{source}: a model at an endpoint needs a local folder with its tokenizer and config.json. Copy these "
            "files from where the model came from into one."
        )
    try:
        contents = {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(
            f"{source}: {error.filename} cannot be read ({error.strerror}). Check its permissions."
        ) from error
    if not contents.keys() & set(TOKENIZERS):
        raise CheckpointError(
            f"{source}: has no tokenizer ({', '.join(TOKENIZERS)}). Copy it and config.json from where the model came "
            "from: prompts are sent as its tokens."
        )
    identity = {"tokenizer": {name: sha256(content).hexdigest() for name, content in contents.items()}}

    def make(out: Path) -> dict[str, str]:
        for name, content in contents.items():
            (out / name).write_bytes(content)
        return {"origin": str(folder.absolute())}

    return Step(KIND, f"pin tokenizer {source}", identity, (), make)
