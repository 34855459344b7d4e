"""Steps in processes of their own: with a time limit, and no death of theirs is the flow's."""

from tasks.apart.build import build_apart
from tasks.apart.call import call_apart, end_calls

__all__ = ["build_apart", "call_apart", "end_calls"]
