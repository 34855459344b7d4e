"""All merging methods, one paper a file. A recipe names a method by the key of ``METHODS``."""

from typing import Final

from merging_core.methods.base import Directions, Site, SpectralMethod, TensorMethod
from merging_core.methods.linear import Linear
from merging_core.methods.r_tsvm import RTsvm
from merging_core.methods.task_arithmetic import TaskArithmetic
from merging_core.methods.tsvm import Tsvm

Method = Linear | TaskArithmetic | Tsvm | RTsvm

METHODS: Final[dict[str, type[Method]]] = {
    "linear": Linear,
    "task_arithmetic": TaskArithmetic,
    "tsvm": Tsvm,
    "r_tsvm": RTsvm,
}

__all__ = [
    "METHODS",
    "Directions",
    "Linear",
    "Method",
    "RTsvm",
    "Site",
    "SpectralMethod",
    "TaskArithmetic",
    "TensorMethod",
    "Tsvm",
]
