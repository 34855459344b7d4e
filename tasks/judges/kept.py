"""Replies of an endpoint, kept on disk as they come: what was paid for once is not asked again."""

import json
import os
import threading
from pathlib import Path
from typing import Final, Self

from tasks.usage import note_use, using

REPLIES: Final = "replies"
"""Folder of a store with a file of replies for each judge."""


class KeptReplies:
    """A file of JSON lines that only grows: digest of a request to the reply. Open it as a context.

    It lies in the folder ``REPLIES`` of a store, whose garbage collection leaves it alone until this process ends.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._replies: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        root = self._path.parents[1]
        with using(root):
            self._file = self._path.open("a+", encoding="utf-8")
            note_use(root, f"{REPLIES}/{self._path.name}")
        self._file.seek(0)
        for line in self._file:
            # A line that a killed run left half written is asked again.
            if line.endswith("\n"):
                try:
                    request, reply = json.loads(line)
                except ValueError:
                    continue
                self._replies[request] = reply
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, request: str) -> bool:
        return request in self._replies

    def __getitem__(self, request: str) -> str:
        return self._replies[request]

    def add(self, request: str, reply: str) -> None:
        """Keep one reply; it is on disk when this returns. Safe to call from several threads and processes."""
        with self._lock:
            self._replies[request] = reply
            # One write in append mode; the newline in front ends a line that a killed run left half written.
            self._file.write(f"\n{json.dumps([request, reply])}\n")
            self._file.flush()
            os.fsync(self._file.fileno())
