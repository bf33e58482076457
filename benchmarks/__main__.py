"""All benchmarks, one after another, and benchmarks/RESULTS.md with what they found (`make bench`).

    python -m benchmarks

Nothing else should run on the machine meanwhile.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from common.config import UserError, run
from common.device import library_versions
from common.files import check_output, written_whole

NAMES = ("p1_captioning", "p2_training", "p2_inference", "p3_attention", "scoring", "gpu_arithmetic")


@dataclass(frozen=True)
class Config:
    output: Path = Path(__file__).with_name("RESULTS.md")
    """Markdown file to write."""


def machine() -> str:
    """The processor and its cores, its memory, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    parts = [names[0] if names else platform.machine(), f"{os.cpu_count()} cores", ", ".join(has) or "no bf16 products"]
    if hasattr(os, "sysconf"):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB")
    parts.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    return ", ".join(parts)


def output_of(name: str) -> str:
    """What the benchmark prints, shown as it comes. Raises UserError where it fails, or its results do not agree."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode or not json.loads(lines[-1]).get("agree", True):
        raise UserError(f"{name}: " + ("failed" if process.returncode else "both ways gave different results"))
    return "".join(lines)


def main(cfg: Config) -> None:
    check_output(cfg.output, overwrite=True)
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    parts = [
        "# What the benchmarks found\n\nWritten by `make bench`.\n",
        f"- machine: {machine()}\n- {versions}, Python {platform.python_version()}\n- {datetime.now(UTC):%Y-%m-%d}\n",
    ]
    for name in NAMES:
        print(f"\n# {name}", flush=True)
        parts.append(f"## {name}\n\n```\n$ python -m benchmarks.{name}\n{output_of(name)}```\n")
    with written_whole(cfg.output) as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    print(cfg.output)


if __name__ == "__main__":
    run(main, Config)
