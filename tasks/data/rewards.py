"""The rewards step: what every head of a reward model says of every row of one dataset, remembered apart.

So another share, another selection or another dataset beside it scores nothing again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from merging_core.devices import parse_devices
from merging_core.errors import CheckpointError, NumericalError
from merging_core.streamed import require_files
from tasks.data.load import Loaded
from tasks.data.rows import Row, Text
from tasks.data.selections import RewardModel
from tasks.models import quiet_transformers
from tasks.progress import track
from tasks.steps import Step
from tasks.store import Ref, Store

REWARDS_VERSION: Final = 1
"""Raise it whenever the same model gives the same rows other rewards by a change of ours."""
FILE: Final = "rewards.parquet"
_BATCH: Final = 32


def rewards_step(dataset: Loaded, settings: RewardModel, model: Ref, store: Store, device: str) -> Step:
    """Score the rows of one dataset: of a completion its reward, of a pair that of chosen minus that of rejected.

    Texts of equal length are scored together, without padding. On another device or in other batches the last bits
    may differ, which the identity ignores, as that of scores does.

    Args:
        dataset: the rows.
        settings: names of the heads, and how the model is read.
        model: its checkpoint.
        store: where the model lies.
        device: torch device; of several, separated by commas, the first.
    """
    title = f"score {dataset.name} by {len(settings.heads)} heads"

    def make(out: Path) -> dict[str, Any]:
        with track(title) as progress:
            scorer = Scorer(store.folder(model), settings, device)
            rewards, num_cut = scorer.score(dataset.rows, progress)
        _write(out / FILE, settings.heads, rewards)
        means = {head: float(mean) for head, mean in zip(settings.heads, rewards.mean(axis=0), strict=True)}
        return {"dataset": dataset.name, "num_rows": len(dataset.rows), "num_cut": num_cut, "means": means}

    identity = {
        "version": REWARDS_VERSION,
        "transformers": version("transformers"),
        "rows": dataset.digest,
        "model": model.digest,
        "settings": {name: value for name, value in asdict(settings).items() if name != "source"},
    }
    return Step("data", title, identity, (model,), make)


def read_rewards(folder: Path) -> Mapping[str, NDArray[np.float64]]:
    """Head to rewards, as a rewards step wrote them."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / FILE)
    return {name: table[name].to_numpy() for name in table.column_names}


class Scorer:
    """A reward model, loaded strictly."""

    def __init__(self, folder: Path, settings: RewardModel, device: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        quiet_transformers()
        require_files(folder)
        self._settings = settings
        self._device = parse_devices(device)[0]
        where = f"reward model {settings.source}"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=len(settings.heads),
                key_mapping=settings.rename or None,
                dtype="auto",
                # Reported below, in our words.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{where}: transformers cannot load it ({reason}). No code of it is run.") from error
        if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
            raise CheckpointError(
                f"{where}: has no weights of the right size for {len(wrong)} tensors, first {wrong[:3]}. Name all "
                f"heads ({len(settings.heads)} are named), and in rename what its checkpoint calls otherwise."
            )
        # No text is padded, and the last token is the one that is read, even if it is the padding token.
        model.config.get_text_config().pad_token_id = -1
        self._model: Any = model.to(self._device).eval()

    def score(self, rows: Sequence[Row], progress: Any) -> tuple[NDArray[np.float64], int]:
        """Rewards, a line for each row and a column for each head, and how many texts were cut."""
        import torch

        texts = [(row.prompt, reply) for row in rows for reply in row.replies]
        encoded = [self._encode(prompt, reply) for prompt, reply in texts]
        cut = sum(len(ids) > self._settings.max_tokens for ids in encoded)
        encoded = [ids[: self._settings.max_tokens] for ids in encoded]
        scores = np.empty((len(encoded), len(self._settings.heads)))
        order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
        done = 0
        with torch.no_grad():
            for _, group in groupby(order, key=lambda place: len(encoded[place])):
                members = list(group)
                for at in range(0, len(members), _BATCH):
                    batch = members[at : at + _BATCH]
                    ids = torch.tensor([encoded[place] for place in batch], device=self._device)
                    logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                    scores[batch] = logits.double().cpu().numpy()
                    done += len(batch)
                    progress(done, len(encoded))
        if not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).any(axis=1).sum())
            raise NumericalError(
                f"reward model {self._settings.source}: {bad} of {len(scores)} rewards are not finite."
            )
        if len(texts) > len(rows):
            return scores[0::2] - scores[1::2], cut
        return scores, cut

    def _encode(self, prompt: Text, reply: Text) -> list[int]:
        """Messages by the chat template; plain text as it stands, with the end of the text where there is one."""
        if isinstance(prompt, str):
            eos = self._tokenizer.eos_token_id
            ids: list[int] = self._tokenizer(f"{prompt}{reply}")["input_ids"]
            return ids if eos is None or ids[-1] == eos else [*ids, eos]
        if not self._tokenizer.chat_template:
            raise CheckpointError(
                f"reward model {self._settings.source}: has no chat template, and the rows are messages. "
                "Name a model with one."
            )
        assert not isinstance(reply, str)
        found: Any = self._tokenizer.apply_chat_template([*prompt, *reply], return_dict=False)
        return list(found)


def _write(path: Path, heads: Sequence[str], rewards: NDArray[np.float64]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({head: rewards[:, at] for at, head in enumerate(heads)}), path)
