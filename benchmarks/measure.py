"""How the benchmarks measure: two ways of one job in one process, in turn, several rounds, medians.

A benchmark prints a table for the reader and, as its last line, one JSON object.
"""

import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data.photos import Photo

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default, aten.baddbmm.default}


@dataclass(frozen=True)
class Rounds:
    """The settings of a benchmark; the sizes of its jobs are constants in its file."""

    rounds: PositiveInt = 3
    """Rounds; the figures are medians over them."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def by_device(sizes: dict[str, Any], device: torch.device) -> Any:
    """The size of a job on this kind of device; the CPU's where the kind has no size of its own.

    >>> by_device({"cpu": 2, "cuda": 16}, torch.device("cuda:1")), by_device({"cpu": 2}, torch.device("mps"))
    (16, 2)
    """
    return sizes.get(device.type, sizes["cpu"])


def write_photos(folder: Path, count: int, width: int = 640, height: int = 480) -> list[Photo]:
    """Write photos of random colours into `folder`, the same in each run."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 12, 16, 3), dtype=np.uint8)
    photos = [Photo(f"{number:03}", folder / f"{number:03}.jpg") for number in range(count)]
    for photo, colours in zip(photos, pixels):
        Image.fromarray(colours).resize((width, height)).save(photo.path)
    return photos


def interleaved(forms: dict[str, Callable[[], Any]], rounds: int = 3) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the forms in turn, `rounds` times: the median seconds of each, and the first result of each."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, Any] = {}
    for number in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            result = form()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
            results.setdefault(name, result)
            print(f"round {number + 1}: {name} {seconds[name][-1]:.3f} s", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def peak_memory(prepare: Callable[..., Callable[[], Any]], *args) -> float:
    """Peak memory of one call of `prepare(*args)()` in a new process, in bytes, without what `prepare` itself holds.

    It is the memory of the process (Linux), or of the GPU if the call uses one.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        peak = child.submit(_measure_peak, prepare, args).result()
    print(f"peak memory: {args[0]} {peak / 1e6:.0f} MB", flush=True)
    return peak


def _measure_peak(prepare: Callable[..., Callable[[], Any]], args: tuple) -> float:
    form = prepare(*args)
    if torch.cuda.is_available() and (before := torch.cuda.memory_allocated()):
        torch.cuda.reset_peak_memory_stats()
        form()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that `prepare` freed must not hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the recorded peak falls to the present use
    before = _status("VmRSS")
    form()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside it, and their floating point operations.

    Fused attention (sdpa) and convolutions are not counted. With `keep`, `replay` computes the same products again,
    from the same tensors.
    """

    def __init__(self, keep: bool = False):
        super().__init__()
        self.keep, self.calls, self.count, self.flops = keep, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.count += 1
            self.flops += 2 * out.numel() * args[-2].shape[-1]
            if self.keep:
                self.calls.append((func, args, kwargs or {}))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def report(title: str, seconds: dict[str, float], figures: dict[str, float | bool]) -> None:
    """Print median seconds and figures as a table, then all of them as one JSON object."""
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name + ', seconds':40}{value:>12.4g}")
    for name, value in figures.items():
        print(f"  {name:40}{str(value) if isinstance(value, bool) else format(value, '.4g'):>12}")
    print(json.dumps(figures | {"seconds": seconds}))
