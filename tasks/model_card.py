"""The model card of a merged model: where it comes from, how it was made, and under which licence its parents stand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from merging_core.recipe import Recipe
from tasks.recipes import recipe_yaml
from tasks.store import Ref

_REFERENCES: Final = {
    "linear": "Wortsman et al., Model soups, arXiv 2203.05482",
    "task_arithmetic": "Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089",
    "tsvm": "Gargiulo et al., Task Singular Vectors, arXiv 2412.00081",
    "r_tsvm": "Yang et al., Mix Data or Merge Models?, arXiv 2502.06876; Tripoise's own parametrisation",
}


def model_card(recipe: Recipe, base: Ref, experts: Mapping[str, Ref], base_folder: Path) -> str:
    """README.md of a merged model: front matter for a hub, parents with digests, method with reference, the recipe."""
    licence = _licence(base_folder)
    front = {"library_name": "transformers", "tags": ["merge", "tripoise", recipe.method.name]}
    if licence:
        front["license"] = licence
    rows = [f"| base | `{recipe.base}` | `{base.digest}` | |"]
    rows += [
        f"| {expert.name} | `{expert.source}` | `{experts[expert.name].digest}` | {expert.weight:g} |"
        for expert in recipe.experts
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=True).strip(),
            "---",
            f"# A merge by {recipe.method.name}",
            "",
            "Made by Tripoise. The merged bits follow from the checkpoints below, by content, and the recipe.",
            "",
            "| parent | source | checkpoint digest | weight |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Method: {_REFERENCES[recipe.method.name]}.",
            f"Licence of the base: {licence or 'not stated in its model card'}. The licences of all parents apply.",
            "",
            "```yaml",
            recipe_yaml(recipe).strip(),
            "```",
            "",
        ]
    )


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    parts = card.read_text(errors="replace").split("---", 2) if card.exists() else []
    if len(parts) < 3:
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return str(licence) if licence else None
