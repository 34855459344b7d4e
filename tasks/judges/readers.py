"""Models that a classifier judge asks: what they read about a response, and what their answer means."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from merging_core.devices import parse_devices
from merging_core.errors import CheckpointError, RecipeError
from merging_core.streamed import require_files
from tasks.generations import Generation
from tasks.models import load_language_model, quiet_transformers

if TYPE_CHECKING:
    from tasks.judges.classifier import ClassifierJudge


class _Reader:
    """A loaded model with what turns a response into tokens."""

    side: ClassVar[Literal["left", "right"]]

    def __init__(self, model: Any, tokenizer: Any, settings: "ClassifierJudge") -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.meaning = dict.fromkeys(map(folded, settings.yes_labels), True) | dict.fromkeys(
            map(folded, settings.no_labels), False
        )
        if settings.template is None and not tokenizer.chat_template:
            raise CheckpointError(
                f"judge classifier {settings.model}: its tokenizer has no chat template. Set template, such as "
                "'{prompt}\\n{response}', as the model was trained to read it."
            )
        tokenizer.padding_side = self.side
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id

    def tokens(self, generation: Generation, response: str) -> list[int]:
        """What the model reads about one response."""
        if (template := self.settings.template) is not None:
            parts = {"prompt": generation.prompt, "response": response, "reference": generation.target}
            return list(self.tokenizer(template.format_map(parts))["input_ids"])
        turns = [{"role": "user", "content": generation.prompt}, {"role": "assistant", "content": response}]
        prompt = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=self.settings.answers_by == "text"
        )
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def too_long(self, tokens: Sequence[int]) -> str:
        """A sentence if the model cannot read that many tokens, else nothing."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        spare = self.settings.max_new_tokens if self.settings.answers_by == "text" else 0
        if most is None or len(tokens) + spare <= most:
            return ""
        return f"not asked: {len(tokens)} tokens, the model reads {most - spare}"

    def padded(self, tokens: Sequence[Sequence[int]]) -> Any:
        """A batch as tensors on the model's device."""
        batch = self.tokenizer.pad({"input_ids": [list(one) for one in tokens]}, return_tensors="pt")
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class Labels(_Reader):
    """Answers by the likeliest label of a sequence classifier."""

    side = "right"

    def __init__(self, folder: Path, settings: "ClassifierJudge") -> None:
        model, tokenizer = _load_classifier(folder, settings.device)
        super().__init__(model, tokenizer, settings)
        labels = model.config.id2label.values()
        if len(labels) < 2 or model.config.problem_type not in (None, "single_label_classification"):
            raise RecipeError(
                f"judge classifier {settings.model}: must choose one of several labels, its config says "
                f"{model.config.problem_type!r} with {len(labels)}. Take another model."
            )
        if lost := [label for label in labels if folded(label) not in self.meaning]:
            raise RecipeError(
                f"judge classifier {settings.model}: labels {lost} are neither in yes_labels nor in no_labels. "
                "Name each of them."
            )
        if unknown := self.meaning.keys() - set(map(folded, labels)):
            raise RecipeError(f"judge classifier {settings.model}: has no label {sorted(unknown)}, but {list(labels)}.")

    def answers(self, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[bool | None, str]]:
        """Yes or no, and the label with its probability."""
        import torch

        with torch.inference_mode():
            logits = self.model(**self.padded(tokens)).logits.float().cpu()
        for row in logits:
            if not bool(torch.isfinite(row).all()):
                yield None, "the model's logits are not finite"
                continue
            label = self.model.config.id2label[int(row.argmax())]
            yield self.meaning[folded(label)], f"{label}, probability {float(row.softmax(0).max()):.2f}"


class Words(_Reader):
    """Answers by the first word that a guard model writes."""

    side = "left"

    def __init__(self, folder: Path, settings: "ClassifierJudge") -> None:
        super().__init__(*load_language_model(folder, settings.device), settings)

    def answers(self, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[bool | None, str]]:
        """Yes or no by the first word, None for any other word; and all that was written."""
        import torch

        batch = self.padded(tokens)
        with torch.inference_mode():
            written = self.model.generate(
                **batch,
                max_new_tokens=self.settings.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        for row in written[:, batch["input_ids"].shape[1] :]:
            said = self.tokenizer.decode(row, skip_special_tokens=True).strip()
            word = folded(said.split()[0]) if said else ""
            yield self.meaning.get(word), said


def _load_classifier(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet_transformers()
    require_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: transformers cannot load it as a classifier ({reason}).") from error
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder}: lacks {len(wrong)} weights of a sequence classifier, first {wrong[:3]}. "
            "For a model that writes its verdict set answers_by: text."
        )
    return model.to(parse_devices(device)[0]).eval(), tokenizer


def folded(label: str) -> str:
    """A label as labels are compared: without case, blanks and punctuation around it."""
    return label.strip().strip(".,:;!").lower()
