"""How the benchmarks measure: two ways of one job in one process, in turn, several rounds, medians.

A benchmark prints a table for the reader and, as its last line, one JSON object.
"""

import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default, aten.baddbmm.default}


@dataclass(frozen=True)
class Rounds:
    """What a benchmark can be told; the sizes of its jobs are constants in its file."""

    rounds: PositiveInt = 3
    """Rounds; medians are taken over them."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def interleaved(forms: dict[str, Callable[[], Any]], rounds: int = 3) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the forms in turn, `rounds` times: the median seconds of each, and what each returned first."""
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
    """Bytes that one call of `prepare(*args)()` takes at its peak beyond what `prepare` left, in a child process.

    Memory of the process (Linux), or of the GPU where the call used one.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(sender, prepare, args), daemon=True)
    child.start()
    sender.close()
    try:
        peak = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{prepare.__name__}{args} ended without a result") from None
    child.join()
    print(f"peak memory: {args[0]} {peak / 1e6:.0f} MB", flush=True)
    return peak


def _measure_peak(sender, prepare: Callable[..., Callable[[], Any]], args: tuple) -> None:
    form = prepare(*args)
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        form()
        sender.send(torch.cuda.max_memory_allocated() - before)
        return
    ctypes.CDLL(None).malloc_trim(0)  # what `prepare` freed must not hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is held now
    before = _status("VmRSS")
    form()
    sender.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Products(TorchDispatchMode):
    """Counts the floating point operations of all matrix products inside, and the bytes that they read and write.

    Fused attention (sdpa) and convolutions are not among them.
    With `keep` they can be called again by `replay`, with the very tensors that they were called with.
    """

    def __init__(self, keep: bool = False):
        super().__init__()
        self.keep, self.calls, self.count, self.flops, self.bytes = keep, [], 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.count += 1
            self.flops += 2 * out.numel() * args[-2].shape[-1]
            self.bytes += sum(one.numel() * one.element_size() for one in (*args, out))
            if self.keep:
                self.calls.append((func, args, kwargs or {}))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def report(title: str, seconds: dict[str, float], **figures: float | bool) -> None:
    """Print median seconds and figures as a table, then all of them as one JSON object."""
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name + ', seconds':40}{value:>12.4g}")
    for name, value in figures.items():
        print(f"  {name:40}{str(value) if isinstance(value, bool) else format(value, '.4g'):>12}")
    print(json.dumps(figures | {"seconds": seconds}))
