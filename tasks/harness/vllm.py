"""lm-eval's model of vLLM, where that is installed.

Not run here: no vLLM was at hand. It follows the signature in lm-eval 0.4.13, which asks for vLLM 0.18 or later.
"""

from pathlib import Path
from typing import Any

from tasks.harness.model import quiet_lm_eval


def load(folder: Path, seed: int) -> Any:
    """Load a model folder with vLLM on the first visible GPU, in its stored dtype, without running code from it."""
    from lm_eval.models.vllm_causallms import VLLM

    quiet_lm_eval()
    return VLLM(pretrained=str(folder.resolve()), dtype="auto", seed=seed, batch_size="auto", trust_remote_code=False)
