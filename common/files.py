"""Files written whole, files that only grow, and checks of where output goes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.config import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there when the block ends well: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as UTF-8 JSON in one atomic step."""
    with written_whole(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def check_output(path: Path, overwrite: bool, key: str = "output") -> None:
    """Make the folder of `path`. Raises UserError where `path` cannot be written, or exists without `overwrite`."""
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{key}: {path} exists; give another name, or --overwrite to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written: no permission")


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, flushed at once, so that a killed run keeps what it measured."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, **figures: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def keep(self, count: int) -> None:
        """Drop all but the first `count` rows."""
        rows = self.rows()[:count]
        with written_whole(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")  # a full disk leaves half a line
        return [json.loads(line) for line in whole.splitlines()]


def folder_problems(folder: Path, replace: bool, hint: str, marker: str | None = None) -> list[str]:
    """What is wrong with an output folder: it is a file, or it exists and may not be replaced.

    `hint` says what to do then. With a `marker`, a folder that is not empty must hold a file of this name.
    """
    if folder.exists() and not folder.is_dir():
        return [f"output: {folder} is a file; expected the name of a folder"]
    if not folder.exists() or not any(folder.iterdir()):
        return []
    if marker and not (folder / marker).exists():
        return [f"output: {folder} holds something other than a run; give another name"]
    return [] if replace else [f"output: {folder} exists; {hint}"]
