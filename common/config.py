"""The command line of every script: its settings, their help and their faults, and its exit codes.

A script ends with `run(main, Config)`. Exit codes: 0 done; 2 the user's mistake (one line on stderr);
3 nothing could be done; 130 / 143 stopped by SIGINT / SIGTERM, with its work saved.
"""

import dataclasses
import difflib
import json
import os
import re
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import NonNegativeInt, PositiveInt

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's: its message names the file, key or photo and what was expected. Exit code 2."""


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
    if not isinstance(values, dict):
        raise UserError(f"expected a mapping of keys to values, got {values!r:.60}")
    return _build(Config, flatten(values))


def field_types(Config: type, prefix: str = "") -> dict[str, Any]:
    """Type of every field of a config dataclass by its dotted name; fields that are dataclasses are entered."""
    fields: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            fields |= field_types(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = kind
    return fields


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name.

    >>> flatten({"seed": 0, "lora": {"rank": 8}})
    {'seed': 0, 'lora.rank': 8}
    """
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


def _read_flags(args: list[str], fields: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """The settings by dotted name, as `args` and the files named in them give them, not yet converted."""
    settings: dict[str, Any] = {}
    files = {"config"} | {name.rpartition(".")[0] for name in fields if "." in name}  # settings, or a group of them
    while args:
        flag, equals, value = args.pop(0).partition("=")
        value = os.path.expanduser(value)  # shells leave the `~` of `--images=~/photos`
        key = aliases.get(flag.removeprefix("--"), flag.removeprefix("--"))
        kind, values = fields.get(key), [value] if equals else []
        while not equals and args and not args[0].startswith("--") and (_is_list(kind) or not values):
            values.append(args.pop(0))
        if not flag.startswith("--") or key not in fields.keys() | files:
            settings[key] = None  # an unknown setting, which is refused later
        elif not values and kind is not bool:
            raise UserError(f"{key}: expected a value, none given")
        elif key in files:
            settings |= flatten(_read_yaml(key, values[0]), "" if key == "config" else f"{key}.")
        elif _is_list(kind) and not values[0].startswith("["):
            if Literal in map(get_origin, get_args(kind)):  # no name of a choice has a comma or a space
                values = " ".join(values).replace(",", " ").split()
            settings[key] = json.dumps(values, ensure_ascii=False)
        else:
            settings[key] = values[0] if values else "true"
    return settings


def _read_yaml(key: str, file: str) -> dict[str, Any]:
    expected = f"{key}: {file}: expected YAML lines of `key: value`" + f" (or --{key}.NAME VALUE)" * (key != "config")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("aliases (*NAME) are not read, since a few of them can stand for gigabytes")
        values = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{expected}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{expected}, got {values!r:.60}")
    return values


def _build(Config: type[T], settings: dict[str, Any]) -> T:
    """The config of these settings by dotted name, each converted to its field's type by jsonargparse."""
    parser, fields = _parser(Config), field_types(Config)
    check([_unknown(key, value, fields) for key, value in settings.items() if key not in fields])
    check([f"{key}: expected at least one value, got none" for key, value in settings.items() if value in ([], "[]")])
    try:
        parsed = parser.instantiate(parser.parse_object(Namespace(settings)))
    except (ArgumentError, TypeError) as error:
        match = re.search(r'key "([^"]+)"|required: (.*)', str(error))
        if match and match[2]:
            raise UserError(f"{match[2]}: required, not given") from None
        if match is None or match[1] not in settings:
            raise UserError(" ".join(str(error).split())) from None
        expected, got = _in_words(fields[match[1]]), str(settings[match[1]])
        raise UserError(f"{match[1]}: expected {expected}, got {got!r}") from None
    return _plain(Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)}))


def _unknown(key: str, value: Any, fields: dict[str, Any]) -> str:
    if any(name.startswith(f"{key}.") for name in fields):
        return f"{key}: expected a mapping of keys to values, got {value!r:.60}"
    near = [name for name in fields if name.endswith(f".{key}")] or difflib.get_close_matches(key, fields, n=1)
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
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, float):
        return float(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_list(kind: Any) -> bool:
    return list in (kind, get_origin(kind)) or any(map(_is_list, get_args(kind)))


def _in_words(kind: Any) -> str:
    """A type in words: `one of a, b`, `PositiveInt or null`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is list:
        return f"a list of {_in_words(*parts)}".replace("a list of one of", "one or more of")
    if parts:  # of a union
        return " or ".join(map(_in_words, parts))
    return "null" if kind is type(None) else kind.__name__


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
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows `?` for what it lacks
    name = Path(sys.argv[0]).name
    try:
        main(parse_config(Config, aliases=aliases))
    except (UserError, OSError, MemoryError, RecursionError) as error:  # full disks, paths that the system refuses
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: error: {text[:2000]}", file=sys.stderr)
        sys.exit(2)
    except NothingDone as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
