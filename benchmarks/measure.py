"""How the benchmarks measure: two ways of one job in one process, in turn, several rounds, medians.

A benchmark prints a table for the reader and, as its last line, one JSON object.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(forms: dict[str, Callable[[], Any]], rounds: int = 3) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the forms in turn, `rounds` times: the median seconds of each, and what each returned first."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, Any] = {}
    for number in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            result = form()
            seconds[name].append(time.perf_counter() - start)
            results.setdefault(name, result)
            print(f"round {number + 1}: {name} {seconds[name][-1]:.3f} s", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def report(title: str, seconds: dict[str, float], **figures: float | bool) -> None:
    """Print median seconds and figures as a table, then all of them as one JSON object."""
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name + ', seconds':40}{value:>12.4g}")
    for name, value in figures.items():
        print(f"  {name:40}{value if isinstance(value, bool) else format(value, '.4g'):>12}")
    print(json.dumps(figures | {"seconds": seconds}))
