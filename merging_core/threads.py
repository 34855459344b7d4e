"""Threads: one for each tensor, several tensors at a time, so that the bytes do not depend on the number of cores.

Torch divides one sum or matrix product among its threads, and the rounding follows the division.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread for each operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computed_ahead(
    names: Iterable[str], compute: Callable[[str], Result], num_workers: int
) -> Generator[tuple[str, Result], None, None]:
    """Call ``compute`` for each name on several threads and hand out the results in order.

    Args:
        names: in the order wanted.
        compute: safe to be called from several threads.
        num_workers: threads, >= 1; at most one result more than that is held.
    """
    if num_workers == 1:
        yield from ((name, compute(name)) for name in names)
        return
    waiting = iter(names)
    running: deque[tuple[str, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for name in islice(waiting, num_workers):
            running.append((name, pool.submit(compute, name)))
        while running:
            name, future = running.popleft()
            result = future.result()
            for following in islice(waiting, 1):
                running.append((following, pool.submit(compute, following)))
            yield name, result
    finally:
        pool.shutdown(cancel_futures=True)
