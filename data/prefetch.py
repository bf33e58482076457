"""Work done ahead by threads while what is ready is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item, Ready = TypeVar("Item"), TypeVar("Ready")


def prefetch(
    items: Iterable[Item], prepare: Callable[[Item], Ready], workers: int = 1, waiting: int = 1
) -> Iterator[Ready]:
    """`prepare(item)` for each item in turn, up to `waiting` of them begun before they are asked for."""
    pool, upcoming = ThreadPoolExecutor(workers), iter(items)
    begun: deque[Future] = deque()
    try:
        while True:
            begun.extend(pool.submit(prepare, item) for item in islice(upcoming, waiting + 1 - len(begun)))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
