"""Files and folders that are written whole, files that only grow, and checks of where output goes."""

import atexit
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.config import UserError, check

# in this repository, whatever folder the scripts are called from
FEATURES = Path(os.environ.get("CAPTION_FEATURES") or Path(__file__).resolve().parents[1] / "runs/features")


def read_text(path: Path, expected: str = "a text file") -> str:
    """The UTF-8 text of `path` (a byte order mark is dropped). Raises UserError saying what was `expected`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; expected {expected}") from None
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; expected {expected}") from None


def files_hash(*places: str | Path) -> str:
    """Hash of the names and contents of these files and of all in these folders; of a file above 64 MB, its size and
    its time count. What is not here, such as the name of a hub's model, counts by its name.
    """
    digest = hashlib.blake2b(repr(places).encode(), digest_size=10)
    for path in sorted(path for one in map(Path, places) for path in (one, *one.rglob("*")) if path.is_file()):
        about = path.stat()
        digest.update(f"{path} {about.st_size}".encode())
        digest.update(path.read_bytes() if about.st_size < 2**26 else str(about.st_mtime_ns).encode())
    return digest.hexdigest()


def check_output(path: Path, overwrite: bool, key: str = "output") -> None:
    """Make the folder of `path`. Raises UserError or OSError where `path` cannot be written, or may not be replaced."""
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{key}: {path} exists; give another name, or --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written: no permission")


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Raise a UserError where an output would be written over one of the inputs, links followed."""
    read = {os.path.realpath(path) for path in inputs if path}
    over = [path for path in outputs if os.path.realpath(path) in read]
    check([f"output: {path} is read by this command; give another name" for path in over])


def lock(path: Path) -> None:
    """Keep the output file `path` until the process ends; the same process may do so again.

    Raises UserError where another process has it, or where nothing can be written; a dead process has nothing.
    """
    file = path.with_name(f".{path.name[-60:]}.lock")
    check_output(file, overwrite=True)
    held = FileLock(file, timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"output: another run is writing {path}; wait for it, or give another name") from None
    atexit.register(held.release)
    atexit.register(file.unlink, missing_ok=True)  # before the release: the last that is registered is called first


def folder_problems(folder: Path | None, replace: bool, hint: str, marker: str | None = None) -> list[str]:
    """What is wrong with an output folder: it exists and may not be replaced; `hint` says what to do then.

    With a `marker`, a folder that is not empty must hold a file of this name. Raises OSError where it is a file.
    """
    if folder is None:
        return ["output: required, not given"]
    if not folder.exists() or not any(path.suffix != ".lock" for path in folder.iterdir()):
        return []
    if marker and not (folder / marker).exists():
        return [f"output: {folder} holds something other than a run; give another name"]
    return [] if replace else [f"output: {folder} exists; {hint}"]


# ------------------------------------------------------------------------------------------- written whole


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there when the block ends well: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[-40:]}.{os.getpid()}.part")  # cut, for a name may have 255 bytes at most
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as UTF-8 JSON in one atomic step."""
    with written_whole(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder`, which takes its place when the block ends well.

    The old folder is kept until the new one is in place. A process killed between the two renames leaves the old one
    at `kept_folder(folder)`; `restore_folder` brings it back.
    """
    part, kept = folder.with_name(f".{folder.name}.part"), kept_folder(folder)
    restore_folder(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(kept, ignore_errors=True)
        if folder.exists():
            os.rename(folder, kept)
        os.rename(part, folder)
    finally:
        restore_folder(folder)
        for leftover in (part, kept):
            shutil.rmtree(leftover, ignore_errors=True)


def kept_folder(folder: Path) -> Path:
    """Where the old `folder` stands while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def restore_folder(folder: Path) -> None:
    """Bring the old `folder` back, where a process was killed after it had moved it away; delete a spare one."""
    if folder.exists():
        shutil.rmtree(kept_folder(folder), ignore_errors=True)
    else:
        with suppress(FileNotFoundError):  # there is nothing to bring back, or another process was faster
            os.rename(kept_folder(folder), folder)


def remove_folder(folder: Path) -> None:
    """Delete `folder` and the old one that a killed process may have left beside it."""
    for path in (folder, kept_folder(folder)):
        shutil.rmtree(path, ignore_errors=True)


def remove_parts(folder: Path, name: str = ".*") -> None:
    """Delete what killed processes have left half written in `folder`, where nothing else writes now.

    `name` is a pattern, with which the names of these files begin.
    """
    for part in folder.glob(f"{name}.part"):
        remove_folder(part) if part.is_dir() else part.unlink()


# ------------------------------------------------------------------------------------------- files that grow


class JsonLines:
    """A file that grows by one JSON value a line.

    Each value is in the file when `append` returns, so a killed run keeps what it wrote. The kill, or a full disk, may
    leave half a last line: `rows` does not read it, and the next `append` cuts it off.
    """

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[Any]:
        """The values so far; none where there is no file. Raises UserError where a whole line is not JSON."""
        try:
            return [json.loads(line.decode()) for line in self.path.read_bytes().split(b"\n")[:-1]]
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: expected one JSON value a line: {error}") from None

    def append(self, value: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read() != b"\n":
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            file.write(json.dumps(value).encode() + b"\n")

    def keep(self, count: int) -> None:
        """Drop all but the first `count` values."""
        with written_whole(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows()[:count]), encoding="utf-8")
