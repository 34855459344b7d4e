"""Watching sources: which checkpoints are there, which of them are new by content, and whether scores fell.

- ``places.py``: where checkpoints lie in a source, whether a folder, a prefix on object storage or a Hub repository
- ``uploads.py``: how a checkpoint that is still being uploaded is recognized
- ``state.py``: what is remembered between two looks: accepted checkpoints and the history of scores
- ``verdict.py``: the paired comparison of a new checkpoint with the accepted one
- ``events.py``: what others are told
- ``records.py``: what goes into a look, and what comes out
- ``measures.py``: which scores can be compared
- ``looks.py``: one look at all sources, and the telling of events
- ``visits.py``: what is done with the places of one source
- ``trend.py``: the step that writes the trend page
"""
