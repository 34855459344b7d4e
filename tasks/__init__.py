"""Thin tasks over plain functions: sources, store, merge, evaluate, report."""

from merging_core.streamed import ReadRange, StreamedFile, read_ranges_with


def _open_ranges(file: StreamedFile) -> ReadRange:
    from tasks.remote import open_ranges

    return open_ranges(file)


# Here, since every process that reads checkpoints imports some of this package: the core knows no network.
read_ranges_with(_open_ranges)
