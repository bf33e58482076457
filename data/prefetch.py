"""Work done ahead by threads while what is ready is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice


def prefetch(items: Iterable, prepare: Callable, workers: int = 1, waiting: int = 1) -> Iterator:
    """`prepare(item)` for each item in turn, up to `waiting` of them begun before they are asked for."""
    pool, upcoming = ThreadPoolExecutor(workers), iter(items)
    try:
        begun = deque(pool.submit(prepare, item) for item in islice(upcoming, waiting + 1))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(prepare, item) for item in islice(upcoming, 1))
    finally:
        pool.shutdown(cancel_futures=True)
