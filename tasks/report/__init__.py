"""The report of a comparison: one self-contained page, a table for machines, a table for people in a hurry.

- ``inputs.py``: what a report is made from
- ``leaderboard.py``: flat rows and Markdown
- ``figures.py``, ``trade_off.py``, ``layers.py``: plots of the scores, and of what happens layer by layer
- ``template.py``, ``page.py``: the page and the files beside it
"""

from tasks.report.inputs import Interference, LayerDiagnostics, ReportInputs
from tasks.report.leaderboard import leaderboard_markdown, leaderboard_rows
from tasks.report.page import write_report

__all__ = [
    "Interference",
    "LayerDiagnostics",
    "ReportInputs",
    "leaderboard_markdown",
    "leaderboard_rows",
    "write_report",
]
