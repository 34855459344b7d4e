"""The alignment step: one vocabulary for a base and its experts, before anything else looks at them.

An aligned checkpoint is a checkpoint like any other, so no later step knows of alignment.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from merging_core.adapter import ADAPTER_WEIGHTS, Adapter, open_expert
from merging_core.adapter_config import ADAPTER_CONFIG, REMEDY
from merging_core.checkpoint import CONFIG, Checkpoint, read_json
from merging_core.compatibility import vocabulary
from merging_core.errors import IncompatibleError
from merging_core.streamed import note_of
from merging_core.vocabulary import (
    TokenizerPolicy,
    Vocabulary,
    base_rows,
    changes,
    counted,
    expert_rows,
    named,
    needs_alignment,
    read_vocabulary,
    target_vocabulary,
    token_tensors,
)
from tasks.aligned_files import TOKENIZER, add_tokens, aligned_config, copy_tokenizer, write_weights
from tasks.steps import Step
from tasks.store import Ref, Store, record_files

# Raise it whenever the same checkpoints are aligned to other bytes.
ALIGN_VERSION: Final = 1

log = logging.getLogger("tripoise.align")


@dataclass(frozen=True, slots=True)
class Family:
    """A base and its experts by name."""

    base: Ref
    experts: Mapping[str, Ref]


def align(family: Family, policy: TokenizerPolicy | None, store: Store) -> tuple[Family, list[Step]]:
    """Give all checkpoints one vocabulary.

    Args:
        family: as the recipe names it.
        policy: ``base`` drops the tokens that the base lacks, ``union`` adds them to all; None: nothing is aligned.
        store: where the checkpoints lie. While one of them is not made yet, nothing can be said.

    Returns:
        The family to be merged, and the steps that make those of its checkpoints that must change.

    Raises:
        IncompatibleError: if an expert lacks tokens of the base, is an adapter with other tokens, or if a token cannot
            be added to the base's tokenizer.
    """
    refs = (family.base, *family.experts.values())
    if policy is None or not all(store.home(ref).exists() for ref in refs):
        return family, []
    with _opened(family, store) as (base, experts):
        ours = read_vocabulary(base)
        theirs = {name: _vocabulary_of(expert, ours) for name, expert in experts.items()}
        target = target_vocabulary(ours, list(theirs.values()), policy)
        plan = _Plan(family, policy, ours, theirs, target, _entries(target, ours, experts))
        if plan.changed():
            rows = token_tensors(base, base, ours.num_rows)
            for name, expert in experts.items():
                if isinstance(expert, Adapter):
                    _require_no_rows(expert, rows)
                else:
                    token_tensors(expert, base, theirs[name].num_rows)
    steps = {name: plan.step(name, store) for name in plan.changed()}
    aligned = Family(
        steps[None].ref if None in steps else family.base,
        {name: steps[name].ref if name in steps else ref for name, ref in family.experts.items()},
    )
    return aligned, list(steps.values())


def alignment_lines(family: Family, store: Store) -> list[str]:
    """What was aligned, for people: one line for each checkpoint that was changed."""
    named_refs = {"the base": family.base} | {f"expert {name!r}": ref for name, ref in family.experts.items()}
    found = {who: store.manifest(ref).details.get("alignment") for who, ref in named_refs.items()}
    return [f"{who} {'; '.join(details['lines'])}" for who, details in found.items() if details]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known before anything is written; None stands for the base, a name for an expert."""

    family: Family
    policy: TokenizerPolicy
    ours: Vocabulary
    theirs: Mapping[str, Vocabulary]
    """Of the experts; an adapter has that of the base."""
    target: Vocabulary
    entries: Sequence[Mapping[str, Any]]

    def changed(self) -> list[str | None]:
        """Whose rows must move."""
        return [name for name in (None, *self.theirs) if needs_alignment(self._own(name), self.target)]

    def step(self, name: str | None, store: Store) -> Step:
        """The step that makes one aligned checkpoint."""
        ref = self.family.experts[name] if name is not None else self.family.base
        # Under union, what is added and what it is filled with comes from all experts.
        others = [expert.digest for expert in self.family.experts.values()] if self.policy == "union" else []
        identity = {
            "align": ALIGN_VERSION,
            "policy": self.policy,
            "checkpoint": ref.digest,
            "base": self.family.base.digest,
            "experts": others,
        }
        parents = {ref, self.family.base, *(self.family.experts.values() if others else ())}
        what = changes(self._own(name), self.target)
        who = "the base" if name is None else name
        done = {"adds": what.filled, "drops": what.dropped, "moves": what.moved}
        told = ", ".join(f"{verb} {counted(tokens)}" for verb, tokens in done.items() if tokens) or "padding"
        return Step(
            "checkpoint",
            f"align {who}: {told}",
            identity,
            tuple(sorted(parents)),
            lambda out: self._make(name, out, store),
        )

    def _own(self, name: str | None) -> Vocabulary:
        return self.ours if name is None else self.theirs[name]

    def _make(self, name: str | None, out: Path, store: Store) -> dict[str, Any]:
        what = changes(self._own(name), self.target)
        filled_from = "the mean of the experts that have them" if name is None else "the base's rows"
        lines = what.lines(filled_from)
        who = "the base" if name is None else f"expert {name!r}"
        log.warning("%s %s", who, "; ".join(lines))
        with _opened(self.family, store) as (base, experts):
            own = base if name is None else experts[name]
            sources = [(expert, self.theirs[key]) for key, expert in experts.items() if not isinstance(expert, Adapter)]

            def compute(tensor: str) -> Tensor:
                rows = base_rows(tensor, base, self.ours, sources, self.target)
                return rows if name is None else expert_rows(tensor, own, self._own(name), self.target, rows)

            ref = self.family.experts[name] if name is not None else self.family.base
            known = store.manifest(ref).files
            if isinstance(own, Adapter):
                links = [ADAPTER_WEIGHTS, ADAPTER_CONFIG]
            else:
                kept = write_weights(own, base, compute, what.num_rows, f"align {who}", out)
                # What the record names, also while a download of streamed weights brings the files beside their notes.
                links = [file if file in known else note_of(own.folder / file).name for file in kept]
                config = aligned_config(own.config, base.config, self.target.num_rows)
                (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            copy_tokenizer(base.folder, out, with_generation=name is None)
            if self.entries:
                add_tokens(out, self.entries, self.target)
            files = record_files(out)
            for file in links:
                (out / file).symlink_to((own.folder / file).resolve())
        alignment = {"policy": self.policy, "lines": lines, **asdict(what)}
        return {"files": files | {file: known[file] for file in links}, "alignment": alignment}


@contextmanager
def _opened(family: Family, store: Store) -> Iterator[tuple[Checkpoint, dict[str, Checkpoint]]]:
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint(store.folder(family.base), "the base"))
        yield (
            base,
            {
                name: stack.enter_context(open_expert(store.folder(ref), base, f"expert {name!r}"))
                for name, ref in family.experts.items()
            },
        )


def _vocabulary_of(expert: Checkpoint, ours: Vocabulary) -> Vocabulary:
    if not isinstance(expert, Adapter):
        return read_vocabulary(expert, ours)
    tokens = vocabulary(expert.folder) or dict(ours.tokens)
    if other := sorted({token for token, _ in tokens.items() ^ ours.tokens.items()} - set(ours.rowless)):
        raise IncompatibleError(
            f"{expert.name}: is an adapter whose tokenizer differs from the base's in {len(other)} tokens "
            f"({named(other)}), and rows of an adapter cannot be moved. {REMEDY}"
        )
    return Vocabulary(expert.name, ours.tokens, ours.num_rows, ours.rowless)


def _require_no_rows(adapter: Adapter, rows: Sequence[str]) -> None:
    changed = [name for name in rows if len(adapter.tensors[name].shape) == 2 and adapter.rank(name) != 0]
    if changed:
        raise IncompatibleError(
            f"{adapter.name}: is an adapter that changes {changed[0]}, and rows of an adapter cannot be moved to "
            f"another vocabulary. {REMEDY}"
        )


def _entries(target: Vocabulary, ours: Vocabulary, experts: Mapping[str, Checkpoint]) -> list[dict[str, Any]]:
    """The ``added_tokens`` of tokens that the base lacks: as in the first expert that has them, with their new ids."""
    added = {token: row for token, row in target.tokens.items() if token not in ours.tokens}
    if not added:
        return []
    found: dict[str, dict[str, Any]] = {}
    for expert in experts.values():
        if (expert.folder / TOKENIZER).exists():
            stored = read_json(expert.folder / TOKENIZER).get("added_tokens", [])
            found = {entry["content"]: entry for entry in stored} | found
    if lost := [token for token in added if token not in found]:
        raise IncompatibleError(
            f"union: {len(lost)} tokens ({named(lost)}) belong to an expert's own tokenizer model; only tokens that "
            "were added to the base's tokenizer can be taken over. Use `tokenizer: base`, which drops them."
        )
    return [found[token] | {"id": row} for token, row in added.items()]
