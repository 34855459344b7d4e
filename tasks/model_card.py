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
    "model_stock": "Jang et al., Model Stock, arXiv 2403.19522",
    "slerp": "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; MergeKit, arXiv 2403.13257",
    "karcher": "Karcher, Riemannian center of mass and mollifier smoothing, Comm. Pure Appl. Math. 30, 1977",
    "iso_c": "Marczak et al., No Task Left Behind, arXiv 2502.04959",
    "iso_cts": "Marczak et al., No Task Left Behind, arXiv 2502.04959",
    "wudi": "Cheng et al., Whoever Started the Interference Should End It, arXiv 2503.08099",
    "ties": "Yadav et al., TIES-Merging, arXiv 2306.01708",
    "dare": "Yu et al., Language models are Super Mario, arXiv 2311.03099",
    "dare_ties": "Yu et al., arXiv 2311.03099 (DARE); Yadav et al., arXiv 2306.01708 (TIES)",
    "della": "Deep et al., DELLA-Merging, arXiv 2406.11617",
    "della_ties": "Deep et al., DELLA-Merging, arXiv 2406.11617",
    "breadcrumbs": "Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795",
    "breadcrumbs_ties": "Davari and Belilovsky, arXiv 2312.06795 (Breadcrumbs); Yadav et al., arXiv 2306.01708 (TIES)",
    "sce": "Wan et al., FuseChat, arXiv 2408.07990",
    "consensus": "Wang et al., Localizing task information, arXiv 2405.07813",
}


def model_card(recipe: Recipe, base: Ref, experts: Mapping[str, Ref], licence: str | None) -> str:
    """README.md of a merged model: front matter for a hub, parents with digests, method with reference, the recipe."""
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


def licence_of(folder: Path) -> str | None:
    """The licence that a checkpoint's model card states in its front matter, if any."""
    card = folder / "README.md"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2) if card.exists() else []
    if len(parts) < 3:
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return str(licence) if licence else None
