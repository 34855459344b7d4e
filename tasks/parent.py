"""A child process that does not outlive the process that started it."""

import os
import sys
import threading


def end_with_parent() -> None:
    """Wait, in a thread, until the parent's end of stdin closes, then end this process at once.

    The parent keeps its end open and writes no more; the kernel closes it even for a process that was killed.
    PR_SET_PDEATHSIG would follow the thread that started the child instead.
    """
    threading.Thread(target=_end_when_stdin_closes, daemon=True).start()


def _end_when_stdin_closes() -> None:
    # Not by sys.stdin: the interpreter could not end with a thread that holds its lock.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
