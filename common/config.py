"""The command line of every script: its settings, their help and their faults, and its exit codes.

A script ends with `run(main, Config)`. Exit codes: 0 done; 2 the user's mistake (one line on stderr);
3 nothing could be done; 130 / 143 stopped by SIGINT / SIGTERM, with its work saved. Of several processes, as
`accelerate launch` and torchrun start them, only the first shows what it does; one that loses another ends with 1.
"""

import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

T = TypeVar("T")


def one_line(text: object, longest: int = 500) -> str:
    """`text` in one line that a terminal shows as it is: control characters are spelt out, a long middle is left out.

    >>> one_line("a\\n b\\x1b[2J" + 600 * "c", longest=20)
    'a b\\\\x1b[ ... ccccccc'
    """
    words = " ".join(str(text).split())
    line = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)
    half = (longest - 5) // 2
    return line if len(line) <= longest else f"{line[: half + 1]} ... {line[-half:]}"


def say(text: object) -> None:
    """Tell the user something on stderr, in one line above the progress bars."""
    tqdm.write(one_line(text), file=sys.stderr)


class UserError(Exception):
    """A mistake of the user's: its message names the file, key or photo and what was expected. Exit code 2."""

    def __init__(self, message: object):
        super().__init__(one_line(message))


class NothingDone(Exception):
    """The request was sound, but nothing could be done (no photo readable, say). Exit code 3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """Settings that mean the same in each of the five scripts."""

    overwrite: bool = False
    """Replace an output that is there, and begin anew."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: NonNegativeInt = 0
    """Decides all that is drawn at random; what is sampled for a photo depends on it and on the photo's name."""
    limit: PositiveInt | None = None
    """Only the first so many photos, of the folder or of the annotations."""


def check(problems: Sequence[str], shown: int = 5) -> None:
    """Raise one UserError that lists the first few of `problems` and counts the rest; return if there are none."""
    if problems:
        rest = len(problems) - shown
        raise UserError("; ".join(problems[:shown]) + (f"; and {rest} more" if rest > 0 else ""))


def parse_config(Config: type[T], args: Sequence[str] | None = None, aliases: dict[str, str] | None = None) -> T:
    """Read a frozen config dataclass from `--config FILE` and flags (nested fields dotted: `--finetune.lr 3e-4`).

    List fields take values separated by spaces, switches need no value, flags may have `aliases` {alias: field}, and
    of two values for one setting the later counts. Raises UserError in one line that begins with the setting's name.
    """
    args = list(sys.argv[1:] if args is None else args)
    if {"-h", "--help"} & set(args):
        _parser(Config).parse_args(["--help"])  # prints it and ends the process
    return _build(Config, _read_flags(args, field_types(Config), aliases or {}))


def config_from(Config: type[T], values: Any) -> T:
    """A config dataclass from nested plain values, checked as on a command line. Raises UserError."""
    return _build(Config, flatten(values))


def field_types(Config: type, prefix: str = "") -> dict[str, str]:
    """Type of every field of a config dataclass by its dotted name; fields that are dataclasses are entered.

    The types are as --help names them: `bool`, `list[int]`, `Literal['a', 'b']`, `PositiveInt | None`.
    """
    fields: dict[str, str] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            fields |= field_types(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = re.sub(r"\w+\.", "", kind.__name__ if isinstance(kind, type) else str(kind))
    return fields


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name. Raises UserError where `values` is no dictionary.

    >>> flatten({"seed": 0, "lora": {"rank": 8}})
    {'seed': 0, 'lora.rank': 8}
    """
    if not isinstance(values, dict):
        raise UserError(f"expected a mapping of keys to values, got {values!r:.60}")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Which settings of `now` were others `before`: `was OLD, is NEW` by dotted name. Both may be nested.

    >>> changes({"seed": 0, "lora": {"rank": 8}}, {"seed": 0, "lora": {"rank": 16}})
    {'lora.rank': 'was 8, is 16'}
    """
    before, now = flatten(before), flatten(now)
    return {key: f"was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value}


def _read_flags(args: list[str], fields: dict[str, str], aliases: dict[str, str]) -> dict[str, Any]:
    """The settings by dotted name, as `args` and the files named in them give them, not yet converted."""
    flags: list[list[str]] = []  # each with its values
    for arg in args:
        if arg.startswith("--") or not flags:
            flags.append(arg.removeprefix("--").split("=", 1))
        else:
            flags[-1].append(arg)
    settings: dict[str, Any] = {}
    files = {"config"} | {name.rpartition(".")[0] for name in fields if "." in name}  # settings, or a group of them
    for flag, *values in flags:
        key = aliases.get(flag, flag)
        kind = fields.get(key, "")
        values = list(map(os.path.expanduser, values))  # shells leave the `~` of --images=~/x
        if "Literal" in kind:  # no name of a choice has a comma
            values = " ".join(values).replace(",", " ").split()
        if key in files and values:
            settings |= read_yaml(key, " ".join(values), "" if key == "config" else f"{key}.")
        elif kind == "bool" and not values:
            settings[key] = True
        else:
            settings[key] = values[0] if len(values) == 1 and "list" not in kind else values
    return settings


def read_yaml(key: str, file: str | Path, prefix: str = "") -> dict[str, Any]:
    """The settings in a YAML file by dotted name, behind `prefix`. Raises UserError, which begins with `key`."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        # by libyaml: PyYAML's own parser takes minutes for text that is nested a thousandfold
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.CSafeLoader)):
            raise ValueError("aliases (*NAME) are not read, since a few of them can stand for gigabytes")
        return flatten(yaml.load(text, yaml.CSafeLoader), prefix)
    except (OSError, ValueError, RecursionError, UserError, yaml.YAMLError) as error:
        raise UserError(f"{key}: {file}: {error}" + f" (or --{key}.NAME VALUE)" * (key != "config")) from None


def _build(Config: type[T], settings: dict[str, Any]) -> T:
    """The config of these settings by dotted name, each converted to its field's type by jsonargparse."""
    parser, fields = _parser(Config), field_types(Config)
    check([f"{key}: expected at least one value, got none" for key, value in settings.items() if value == []])
    check([_unknown(key, fields) for key in settings if key not in fields])
    for key, value in settings.items():  # a file may name one photo of a list: `images: photos`
        settings[key] = [value] if isinstance(value, str) and "list" in fields[key] else value
    needed = [key for key, value in settings.items() if value is None and not re.search("None|Optional", fields[key])]
    check([f"{key}: expected {_words(fields[key])}, got nothing" for key in needed])
    try:
        parsed = parser.instantiate(parser.parse_object(Namespace(settings)))
    except (ArgumentError, TypeError) as error:
        key = next((key for key in settings if f'key "{key}"' in str(error)), None)
        if key is None:  # a setting that is required, and not given
            raise UserError(" ".join(str(error).split())) from None
        kind, given = fields[key], settings[key]
        given = " ".join(map(str, given)) if "list" in kind and isinstance(given, list) else str(given)
        raise UserError(f"{key}: expected {_words(kind)}, got {given!r}") from None
    return _plain(Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)}))


def _words(kind: str) -> str:
    """A type as messages name it; of a choice the values."""
    names = ", ".join(re.findall("'(.*?)'", kind))
    return f"one {'or more ' * kind.startswith('list')}of {names}" if names else kind


def _unknown(key: str, fields: dict[str, str]) -> str:
    near = [name for name in fields if key in name.split(".")] or difflib.get_close_matches(key, fields, n=1)
    return f"{key}: unknown setting; " + (f"did you mean {' or '.join(near)}?" if near else "--help lists them all")


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the line breaks of the script's docstring."""


def _parser(Config: type) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    about = sys.modules[Config.__module__].__doc__
    parser = ArgumentParser(description=about, exit_on_error=False, allow_abbrev=False, formatter_class=_Help)
    parser.add_class_arguments(Config)
    parser.add_argument("--config", help="YAML file of settings; flags after it override it")
    return parser


def _plain(value: Any) -> Any:
    """A config with plain numbers: one of PositiveFloat would be pickled as such, and no safe loader takes it back."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{name: _plain(field) for name, field in vars(value).items()})
    return json.loads(json.dumps(value)) if isinstance(value, int | float) else value


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values, for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Give a list that gets the number of a SIGTERM or SIGINT, so that work can stop at a good moment.

    A second signal acts as it did before.
    """
    caught: list[int] = []

    def restore(*signals: object) -> None:
        caught.extend(signals[:1])  # a handler is called with the signal's number and a stack frame
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, restore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        restore()


def run(main: Callable[[T], None], Config: type[T], aliases: dict[str, str] | None = None) -> None:
    """Parse the command line, call `main` with it and end the process with the suite's exit codes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in background jobs of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows `?` for what it lacks
    name, first, nowhere = Path(sys.argv[0]).name, os.environ.get("RANK", "0") == "0", open(os.devnull, "w")
    try:
        with redirect_stdout(sys.stdout if first else nowhere), redirect_stderr(sys.stderr if first else nowhere):
            main(parse_config(Config, aliases=aliases))
    except (UserError, OSError, MemoryError, RecursionError) as error:  # full disks, paths that the system refuses
        time.sleep(0 if first else 20)  # if the first process says the same, the launcher ends this one meanwhile
        print(f"{name}: error: {one_line(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except NothingDone as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # neither gloo nor NCCL has an error of its own for a lost process
        if "RANK" not in os.environ or not re.search("by peer|timed? ?out|NCCL", str(error), re.IGNORECASE):
            raise
        sys.exit(f"{name}: another process has ended or does not answer, so this one ends; the run can go on")
