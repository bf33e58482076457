"""The command line: what it reads, and the one line with which it answers each kind of mistake."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse.typing import PositiveFloat, PositiveInt

from common.config import UserError, check, field_types, parse_config
from common.device import pick_device
from common.files import (
    JsonLines,
    check_output,
    folder_written_whole,
    kept_folder,
    lock,
    remove_folder,
    restore_folder,
    written_whole,
)


@dataclass(frozen=True)
class Part:
    rank: PositiveInt = 4
    kind: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class Config:
    output: str
    """Where to write."""
    names: list[str] = field(default_factory=list)
    layers: list[int] | None = None
    count: PositiveInt = 1
    limit: PositiveInt | None = None
    rate: PositiveFloat = 0.5
    overwrite: bool = False
    folder: Path = Path("here")
    part: Part = Part()


def parse(*args: str, **options) -> Config:
    return parse_config(Config, ["--output", "out", *args], **options)


def test_defaults_and_types():
    assert parse() == Config("out")
    assert field_types(Config)["part.rank"] == "PositiveInt"
    assert isinstance(parse().part, Part) and isinstance(parse().folder, Path)


@pytest.mark.parametrize("args, name, value", [
    (["--names", "a b", "c"], "names", ["a b", "c"]),
    (["--names", "a"], "names", ["a"]),
    (["--names=a"], "names", ["a"]),
    (["--names", "7", "true", "null"], "names", ["7", "true", "null"]),
    (["--layers", "1", "-2"], "layers", [1, -2]),
    (["--overwrite"], "overwrite", True),
    (["--overwrite", "--count", "2"], "overwrite", True),
    (["--overwrite", "false"], "overwrite", False),
    (["--limit", "3"], "limit", 3),
    (["--limit", "null"], "limit", None),
    (["--rate", "3e-4"], "rate", 3e-4),
    (["--folder", "a/b"], "folder", Path("a/b")),
    (["--part.rank", "8"], "part", Part(8)),
    (["--part.kind=two", "--part.rank=3"], "part", Part(3, "two")),
])  # fmt: skip
def test_flags(args, name, value):
    assert getattr(parse(*args), name) == value


def test_aliases():
    assert parse("--how_many", "3", "--n", "a", "b", aliases={"how_many": "count", "n": "names"}).names == ["a", "b"]
    assert parse("--how_many=3", aliases={"how_many": "count"}).count == 3


def test_file_of_settings_and_flags_after_it(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("count: 5\nrate: 3e-4\nnames: [a, b]\npart: {rank: 8}\n")
    cfg = parse("--config", str(file), "--part.kind", "two", "--count", "6")
    assert (cfg.count, cfg.rate, cfg.names, cfg.part) == (6, 3e-4, ["a", "b"], Part(8, "two"))


def test_a_file_for_a_group_of_settings(tmp_path):
    (tmp_path / "part.yaml").write_text("rank: 8\n")
    assert parse("--part", str(tmp_path / "part.yaml"), "--part.kind", "two").part == Part(8, "two")


def test_settings_are_explained(capsys):
    with pytest.raises(SystemExit):
        parse("--names", "a", "b", "--help")
    out = capsys.readouterr().out
    assert "Where to write." in out and "--part.rank" in out and "--config" in out and "--print_config" not in out


def test_lists_of_choices_are_named_in_words():
    @dataclass(frozen=True)
    class Chosen:
        metrics: list[Literal["cider", "bleu"]] = field(default_factory=list)

    with pytest.raises(UserError, match="^metrics: expected one or more of cider, bleu, got 'spice'$"):
        parse_config(Chosen, ["--metrics", "spice"])
    assert parse_config(Chosen, ["--metrics", "cider,bleu", "cider"]).metrics == ["cider", "bleu", "cider"]


def test_paths_in_the_home_folder_and_words_for_a_file(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--folder=~/photos").folder == Path("/home/me/photos")
    with pytest.raises(UserError, match=r"^part: greedy: .*No such file.* \(or --part.NAME VALUE\)"):
        parse("--part", "greedy")


def test_numbers_are_plain():
    cfg = parse("--rate", "3e-4", "--count", "6", "--layers", "1", "2", "--part.rank", "8")
    assert {type(number) for number in (cfg.count, *cfg.layers, cfg.part.rank)} == {int} and type(cfg.rate) is float
    assert type(cfg.overwrite) is bool


MISTAKES = [
    (["--cout", "3"], "cout: unknown setting; did you mean count?"),
    (["--part.rnk", "3"], "part.rnk: unknown setting; did you mean part.rank?"),
    (["--rank", "3"], "rank: unknown setting; did you mean part.rank?"),
    (["--coun", "3"], "coun: unknown setting; did you mean count?"),  # no abbreviations
    (["--count", "0"], "count: expected PositiveInt, got '0'"),
    (["--count", "many"], "count: expected PositiveInt, got 'many'"),
    (["--limit", "-1"], "limit: expected PositiveInt | None, got '-1'"),
    (["--rate", "x"], "rate: expected PositiveFloat, got 'x'"),
    (["--overwrite", "maybe"], "overwrite: expected bool, got 'maybe'"),
    (["--part.kind", "three"], "part.kind: expected one of one, two, got 'three'"),
    (["--part.rank", "1.5"], "part.rank: expected PositiveInt, got '1.5'"),
    (["--count"], "count: expected at least one value, got none"),
    (["--layers"], "layers: expected at least one value, got none"),
    (["--layers", "1", "b"], "layers: expected list[int] | None, got '1 b'"),
    (["stray"], "output: expected str, got \"['out', 'stray']\""),
    (["--overwrite", "stray"], "overwrite: expected bool, got 'stray'"),
]


@pytest.mark.parametrize("args, message", MISTAKES)
def test_mistakes(args, message):
    with pytest.raises(UserError) as error:
        parse(*args)
    assert str(error.value) == message


@pytest.mark.parametrize("text, message", [
    ("cout: 3", "cout: unknown setting; did you mean count?"),
    ("part: {rnk: 3}", "part.rnk: unknown setting; did you mean part.rank?"),
    ("count: 0", "count: expected PositiveInt, got '0'"),
    ("count: 1.5", "count: expected PositiveInt, got '1.5'"),
    ("limit: x", "limit: expected PositiveInt | None, got 'x'"),
    ("limit: -1", "limit: expected PositiveInt | None, got '-1'"),
    ("layers: [a]", "layers: expected list[int] | None, got 'a'"),
    ("names: []", "names: expected at least one value, got none"),
    ("names: 3", "names: expected list[str], got '3'"),
    ("part: {kind: three}", "part.kind: expected one of one, two, got 'three'"),
    ("part: {rank: [1]}", "part.rank: expected PositiveInt, got '[1]'"),
    ("part: 3", "part: unknown setting; did you mean part.rank or part.kind?"),
    ("part: {rank: 8, rnk: 3}", "part.rnk: unknown setting; did you mean part.rank?"),
    ("- a", "config: FILE: expected a mapping of keys to values, got ['a']"),
    ("", "config: FILE: expected a mapping of keys to values, got None"),
    ("names: &a [x]\nfolder: *a", "config: FILE: aliases (*NAME) are not read, since a few of them can stand for "
     "gigabytes"),
])  # fmt: skip
def test_mistakes_in_a_file(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", str(file))
    assert str(error.value).replace(str(file), "FILE") == message


def test_one_value_of_a_list_in_a_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("names: photos\noutput: out")
    assert parse("--config", str(tmp_path / "settings.yaml")).names == ["photos"]


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(UserError, match="^config: .*settings.yaml: .*No such file"):
        parse("--config", str(tmp_path / "settings.yaml"))
    (tmp_path / "settings.yaml").write_text("count: [1")
    with pytest.raises(UserError, match="(?s)^config: .*settings.yaml: .*line 1"):
        parse("--config", str(tmp_path / "settings.yaml"))


def test_required():
    with pytest.raises(UserError, match="^the following arguments are required: output$"):
        parse_config(Config, [])


SCRIPT = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
from dataclasses import dataclass
from common.config import NothingDone, UserError, run
@dataclass(frozen=True)
class Config:
    how: str = "well"
def main(cfg):
    if cfg.how == "mistake": raise UserError("how: expected\\nsomething else")
    if cfg.how == "nothing": raise NothingDone("none of 3 photos could be decoded")
    if cfg.how == "emoji": print("a dog \\N{DOG FACE}")
    if cfg.how == "long": raise UserError("x" * 100_000)
    if cfg.how == "full": raise OSError(28, "No space left on device", "x.json")
    if cfg.how == "fault": raise ZeroDivisionError
    if cfg.how == "int": os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
    if cfg.how == "term": os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)
run(main, Config)
"""


def test_exit_codes_and_single_lines(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    hows = ("--how " + how for how in "emoji long mistake nothing full fault int term".split())
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = {"PYTHONPATH": ".", "PATH": "", "PYTHONIOENCODING": "cp1252"}
    started = {
        tuple(args.split()): subprocess.Popen([sys.executable, tmp_path / "script.py", *args.split()], **options)
        for args in ("", "--who x", *hows)
    }
    said = {args: process.communicate() for args, process in started.items()}
    done = {args: (said[args][1], process.returncode) for args, process in started.items()}
    assert said["--how", "emoji"] == ("a dog ?\n", "") and done["--how", "emoji"][1] == 0
    assert len(done["--how", "long"][0]) < 2100
    assert done[()] == ("", 0)
    assert done["--how", "mistake"] == ("script.py: error: how: expected something else\n", 2)
    assert done["--how", "nothing"] == ("script.py: none of 3 photos could be decoded\n", 3)
    assert done["--how", "full"] == ("script.py: error: [Errno 28] No space left on device: 'x.json'\n", 2)
    assert done["--how", "int"] == ("script.py: stopped\n", 130)
    assert done["--how", "term"] == ("", 128 + signal.SIGTERM)
    assert done["--who", "x"] == ("script.py: error: who: unknown setting; did you mean how?\n", 2)
    assert "Traceback" in done["--how", "fault"][0] and done["--how", "fault"][1] == 1  # our faults are not hidden


def test_check_collects_problems():
    check([])
    with pytest.raises(UserError, match="^a; b; and 2 more$"):
        check(["a", "b", "c", "d"], shown=2)


def test_written_whole_leaves_the_old_file_on_failure(tmp_path):
    file = tmp_path / "new" / "file.txt"
    with written_whole(file) as part:
        part.write_text("first")
    with pytest.raises(ZeroDivisionError), written_whole(file) as part:
        part.write_text("second")
        raise ZeroDivisionError
    assert file.read_text() == "first" and list(file.parent.iterdir()) == [file]
    with pytest.raises(UserError, match="output: .*file.txt exists"):
        check_output(file, overwrite=False)
    check_output(file, overwrite=True)


def test_temporary_names_fit_the_longest_names(tmp_path):
    with written_whole(tmp_path / ("x" * 250)) as part:
        part.write_text("whole")
    assert (tmp_path / ("x" * 250)).read_text() == "whole"
    with pytest.raises(OSError, match="File name too long: .*xxx"):
        check_output(tmp_path / ("x" * 300), overwrite=False)


def files_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "runs" / "best"
    for text in ("first", "second"):
        with folder_written_whole(folder) as part:
            (part / f"{text}.txt").write_text(text)
    assert files_in(tmp_path) == {"runs/best/second.txt": "second"}
    with pytest.raises(ZeroDivisionError), folder_written_whole(folder) as part:
        (part / "third.txt").write_text("half")
        raise ZeroDivisionError
    assert files_in(tmp_path) == {"runs/best/second.txt": "second"} and len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize("step", ["rename", "rmtree"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_folder_survives_a_kill_at_any_step_of_its_replacement(tmp_path, step, call):
    """In a process of its own, which dies without a word at the first, second or third call of `step`."""
    folder = tmp_path / "best"
    with folder_written_whole(folder) as part:
        (part / "text").write_text("old")
    script = f"""
import os, shutil, sys
from pathlib import Path
from common.files import folder_written_whole
calls, module = [], {{"rename": os, "rmtree": shutil}}["{step}"]
real = getattr(module, "{step}")
def dying(*args, **kwargs):
    calls.append(args)
    if len(calls) > {call}: os._exit(9)
    return real(*args, **kwargs)
setattr(module, "{step}", dying)
with folder_written_whole(Path(sys.argv[1])) as part: (part / "text").write_text("new")
"""
    subprocess.run([sys.executable, "-c", script, folder], env={"PYTHONPATH": ".", "PATH": ""})
    found = folder if folder.exists() else kept_folder(folder)
    assert files_in(found) in ({"text": "old"}, {"text": "new"})
    restore_folder(folder)
    assert files_in(folder) in ({"text": "old"}, {"text": "new"})
    with folder_written_whole(folder) as part:
        (part / "text").write_text("next")
    assert files_in(tmp_path) == {"best/text": "next"}  # nothing is left behind
    os.rename(folder, kept_folder(folder))
    restore_folder(folder)
    assert files_in(tmp_path) == {"best/text": "next"}
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_json_lines(tmp_path):
    log = JsonLines(tmp_path / "run" / "metrics.jsonl")
    assert log.rows() == []
    for step in range(3):
        log.append({"step": step, "loss": 0.5})
    log.keep(2)
    log.append({"step": 7, "loss": 0.25})
    assert [row["step"] for row in log.rows()] == [0, 1, 7]


@pytest.mark.parametrize("half", [b"", b'{"step": 1, "lo', "🐕".encode()[:2]])
def test_half_a_last_line_is_not_read_and_dropped(tmp_path, half):
    log = JsonLines(tmp_path / "log")
    log.append({"step": 0})
    with log.path.open("ab") as file:
        file.write(half)
    assert log.rows() == [{"step": 0}]
    log.append(["über", None])
    assert log.rows() == [{"step": 0}, ["über", None]]
    log.path.write_bytes(half)  # not even one line is whole
    assert log.rows() == []
    log.append(1)
    assert log.rows() == [1]


@pytest.mark.parametrize("broken", [b"{}\n{half\n{}\n", b"{}\n\xff\n", b"[" * 100_000 + b"\n"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    (tmp_path / "log").write_bytes(broken)
    with pytest.raises(UserError, match="log: expected one JSON value a line"):
        JsonLines(tmp_path / "log").rows()


def test_device_that_is_not_there():
    assert pick_device("cpu").type == "cpu"
    for name in ("no_such_device", "cuda:99"):
        with pytest.raises(UserError, match=f"device: '{name}' is not available"):
            pick_device(name)


LOCKED = """
import sys, time
from pathlib import Path
from common.files import lock
lock(Path(sys.argv[1])), print("locked", flush=True), time.sleep(float(sys.argv[2]))
"""


def test_a_lock_is_of_one_process_and_ends_with_it(tmp_path):
    command = [sys.executable, "-c", LOCKED, tmp_path / "x.json"]
    other = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, env={"PYTHONPATH": ".", "PATH": ""})
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="output: another run is writing .*x.json"):
        lock(tmp_path / "x.json")
    other.kill(), other.wait()
    twice = [sys.executable, "-c", LOCKED + LOCKED, tmp_path / "x.json", "0"]
    assert subprocess.run(twice, capture_output=True, env={"PYTHONPATH": "."}).stdout == b"locked\nlocked\n"
    assert not list(tmp_path.iterdir())
    lock(tmp_path / "x.json")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as in a folder of mode 555
    with pytest.raises(UserError, match="^output: .*run.lock cannot be written: no permission"):
        lock(tmp_path / "run")
