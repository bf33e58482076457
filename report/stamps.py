"""Running the steps: what was made by the same command from the same inputs is not made again.

Beside the output of a step lies a stamp, `.NAME.stamp.json`: its command, the fingerprints of its inputs and, once it
is done, its seconds. A stamp without seconds is of a step that was stopped: it goes on where it was.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common.files import write_json
from report.steps import Step


def fingerprint(path: Path) -> str | None:
    """Hash of the sizes and times of a file, or of all files in a folder; None where there is none (a hub id, say)."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16] if stats else None


def stamp_file(step: Step) -> Path:
    return step.output.with_name(f".{step.output.name}.stamp.json")


def read_stamp(step: Step) -> dict:
    """The stamp of a step; empty where there is none that can be read."""
    try:
        return json.loads(stamp_file(step).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def wanted_stamp(step: Step) -> dict:
    """What the stamp of a step says before the step is done."""
    return {"command": step.command, "inputs": {str(path): fingerprint(path) for path in step.needs}}


def is_done(step: Step) -> bool:
    stamp, made = read_stamp(step), step.makes or (step.output,)
    return wanted_stamp(step).items() <= stamp.items() and "seconds" in stamp and all(path.exists() for path in made)


def more_flags(step: Step) -> str:
    """What the command needs besides: to go on with its own work if it was stopped, else to replace older work."""
    stamp = read_stamp(step)
    stopped = stamp == wanted_stamp(step)
    if step.command.startswith(("-m demo.shapes", "-m demo.standins")):  # they know what is there and whole
        return " --overwrite" if stamp and not stopped else ""
    if step.command.startswith("-m "):
        return ""  # they always replace
    if stopped and step.command.startswith("p2_train.py") and (step.output / "last/trainer.pt").exists():
        return " --resume"
    return "" if stopped and step.output.with_suffix(".journal.jsonl").exists() else " --overwrite"


def execute(command: str) -> int:
    """Run `python COMMAND`; returns its exit code."""
    return subprocess.run([sys.executable, *shlex.split(command)]).returncode


def run_steps(steps: list[Step]) -> None:
    """Do what is not done yet, one line a step; where a command fails, the process ends with its exit code."""
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.name}"
        if is_done(step):
            print(f"{head}: done before", flush=True)
            continue
        command, start = step.command + more_flags(step), time.monotonic()
        print(f"\n{head}\n$ python {command}", flush=True)
        write_json(stamp_file(step), wanted_stamp(step))
        if code := execute(command):
            print(f"{head}: failed; the same command goes on from here", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)
        write_json(stamp_file(step), wanted_stamp(step) | {"seconds": round(time.monotonic() - start)})
