"""Statistics of a comparison: scores with standard errors, paired intervals, the Pareto front, honest sentences.

All models answer the same samples, so differences are taken sample by sample. That removes the difficulty of a
sample from the comparison: two models with wide, overlapping standard errors can still differ clearly.

- ``records.py``: what goes in and what comes out
- ``statistics.py``: means, standard errors, the paired bootstrap
- ``families.py``: which models are compared, and who stands for each role
- ``table.py``: ``compare``, from samples to rows
- ``ranks.py``: which methods share a rank
- ``notes.py``: what the numbers say, in sentences
"""

from tasks.comparison.records import (
    DIMENSIONS,
    Benchmark,
    Comparison,
    Difference,
    Interval,
    ModelSamples,
    Role,
    Row,
    Score,
    Split,
)
from tasks.comparison.table import compare

__all__ = [
    "DIMENSIONS",
    "Benchmark",
    "Comparison",
    "Difference",
    "Interval",
    "ModelSamples",
    "Role",
    "Row",
    "Score",
    "Split",
    "compare",
]
