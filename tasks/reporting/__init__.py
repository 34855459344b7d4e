"""From scores in the store to a report: what is compared, the choice on validation, the report step, delivery.

- ``entries.py``: the models of a report
- ``dimensions.py``: scores of each H, and the choice by them
- ``inputs.py``, ``provenance.py``: what a report shows, and where it comes from
- ``step.py``: the report step
- ``delivery.py``: scores of one model as a folder
"""

from tasks.reporting.delivery import deliver_scores
from tasks.reporting.dimensions import best_on_validation, dimension_scores
from tasks.reporting.entries import Entry, SecondOpinion
from tasks.reporting.inputs import compared
from tasks.reporting.step import LEADERBOARD_FILE, StoredReport, read_report, report_step

__all__ = [
    "LEADERBOARD_FILE",
    "Entry",
    "SecondOpinion",
    "StoredReport",
    "best_on_validation",
    "compared",
    "deliver_scores",
    "dimension_scores",
    "read_report",
    "report_step",
]
