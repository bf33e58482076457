"""Run all benchmarks, one after another, and write what they found to a Markdown file (`make bench`).

    python -m benchmarks                  # benchmarks/RESULTS.md; 20 minutes on two CPU cores
    python -m benchmarks --device cuda    # benchmarks/GPU.md

Nothing else should run on the machine at the same time.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from common.config import UserError, run
from common.device import library_versions, pick_device
from common.files import check_output, written_whole

NAMES = ("p1_captioning", "p2_training", "p2_inference", "p3_attention", "scoring")


@dataclass(frozen=True)
class Config:
    """Which benchmarks run, where, and the file to write."""

    names: list[str] = field(default_factory=lambda: list(NAMES))
    """The benchmarks to run."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps."""
    output: Path | None = None
    """Markdown file to write; by default RESULTS.md for a CPU and GPU.md for a GPU, in this folder."""


def machine(device: torch.device) -> str:
    """The processor, its cores, its products in bf16, the memory, and the GPU if the benchmarks use one."""
    info = Path("/proc/cpuinfo").read_text()  # of Linux, as is the memory that the benchmarks measure
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    bf16 = ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in info) or "no bf16 products"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    return f"{name}, {os.cpu_count()} cores, {bf16}, {memory:.0f} GB, {gpu}"


def output_of(command: str) -> str:
    """Run a benchmark and show its output. Raises UserError where it fails, or where its two ways do not agree."""
    with subprocess.Popen([sys.executable, *command.split()[1:]], stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode or not json.loads(lines[-1])["agree"]:
        raise UserError(f"{command}: " + ("failed" if process.returncode else "both ways gave different results"))
    return "".join(lines)


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    output = cfg.output or Path(__file__).with_name("RESULTS.md" if device.type == "cpu" else "GPU.md")
    check_output(output, overwrite=True)
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    about = f"- {machine(device)}\n- {versions}, Python {platform.python_version()}\n- {datetime.now(UTC):%Y-%m-%d}\n"
    parts = [f"# What the benchmarks found\n\nWritten by `python -m benchmarks --device {device}`.\n\n{about}"]
    for name in cfg.names:
        print(f"\n# {name}", flush=True)
        command = f"python -m benchmarks.{name} --device {device}"
        parts.append(f"## {name}\n\n```\n$ {command}\n{output_of(command)}```\n")
    with written_whole(output) as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    run(main, Config)
