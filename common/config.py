"""The command line of every script: its settings, their help and their faults, and its exit codes.

A script ends with `run(main, Config)`. Exit codes: 0 done; 2 the user's mistake (one line on stderr);
3 nothing could be done; 130 / 143 stopped by SIGINT / SIGTERM, with its work saved.
"""

import dataclasses
import difflib
import json
import re
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's: its message names the file, key or photo and what was expected. Exit code 2."""


class NothingDone(Exception):
    """The request was sound, but nothing could be done (no photo readable, say). Exit code 3."""


def check(problems: Sequence[str], shown: int = 5) -> None:
    """Raise one UserError that lists the first few of `problems` and counts the rest; return if there are none."""
    if problems:
        rest = len(problems) - shown
        raise UserError("; ".join(problems[:shown]) + (f"; and {rest} more" if rest > 0 else ""))


def parse_config(Config: type[T], args: Sequence[str] | None = None, aliases: dict[str, str] | None = None) -> T:
    """Read a frozen config dataclass from `--config FILE` and flags (nested fields dotted: `--finetune.lr 3e-4`).

    jsonargparse does the work; mended here: list fields take values separated by spaces, switches stand bare,
    flags may have `aliases` {alias: field}, and a mistake is a UserError of one line that begins with the key.
    """
    from jsonargparse import ArgumentError

    parser, fields = _parser(Config), field_types(Config)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it")
    args = _spaced_lists_and_bare_switches(sys.argv[1:] if args is None else args, fields, aliases or {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = parser.instantiate(parser.parse_args(args))
    except (ArgumentError, TypeError) as error:
        raise UserError(_one_line(str(error), fields, args)) from None
    return _built(Config, parsed)


def config_from(Config: type[T], values: Any) -> T:
    """A config dataclass from nested plain values, checked like a command line. Raises UserError."""
    from jsonargparse import ArgumentError

    if not isinstance(values, dict):
        raise UserError(f"expected a mapping of keys to values, got {values!r:.60}")
    parser = _parser(Config)
    try:
        parsed = parser.instantiate(parser.parse_object(values))
    except (ArgumentError, TypeError) as error:
        raise UserError(_one_line(str(error), field_types(Config), ())) from None
    return _built(Config, parsed)


def _built(Config: type[T], parsed: Any) -> T:
    return _plain(Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)}))


def _plain(value: Any) -> Any:
    """A config with plain numbers: one of PositiveFloat would be pickled as such, and no safe loader takes it back."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, float):
        return float(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _parser(Config: type):
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    about = sys.modules[Config.__module__].__doc__
    parser = ArgumentParser(prog=Path(sys.argv[0]).name, description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config)
    return parser


def field_types(Config: type, prefix: str = "") -> dict[str, Any]:
    """Type of every field of a config dataclass by its dotted name; fields that are dataclasses are entered."""
    fields: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            fields |= field_types(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = kind
    return fields


def _is_list(kind: Any) -> bool:
    return list in (kind, typing.get_origin(kind)) or any(_is_list(part) for part in typing.get_args(kind))


def _spaced_lists_and_bare_switches(args: Sequence[str], fields: dict[str, Any], aliases: dict[str, str]) -> list[str]:
    """Rewrite `--xs 1 2 --dry_run` as `--xs=["1", "2"] --dry_run=true`, the form that jsonargparse reads."""
    given, out = list(args), []
    while given:
        flag, equals, value = given.pop(0).partition("=")
        key = flag.removeprefix("--")
        key = aliases.get(key, key)
        values = [value] if equals else []
        if not flag.startswith("--") or key not in fields:
            out.append(flag + equals + value)
            continue
        while not equals and given and not given[0].startswith("--") and (_is_list(fields[key]) or not values):
            values.append(given.pop(0))
        if fields[key] is bool and not values:
            values = ["true"]
        if _is_list(fields[key]) and values and not values[0].startswith("["):
            values = [json.dumps(values, ensure_ascii=False)]
        out.append(f"--{key}={values[0]}" if values else f"--{key}")
    return out


def _expected(kind: Any) -> str:
    """A type in words: `one of a, b`, `PositiveInt or null`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, parts))
    if kind is type(None):
        return "null"
    return str(kind) if parts else kind.__name__


def _one_line(message: str, fields: dict[str, Any], args: Sequence[str]) -> str:
    """jsonargparse's message as `KEY: what was expected, what was given`."""
    if match := re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        key, detail = match[1], " ".join(match[2].split())
        if key not in fields:
            return f"{key}: {detail}"
        what = next((arg.partition("=")[2] for arg in reversed(args) if arg.startswith(f"--{key}=")), None)
        if what is None:  # it stands in the file of --config
            given = re.search(r"Given value: (.*)$", detail) or re.search(
                r"Got value: (.*)$|: (\S+) (?:does not conform|not an)|(?:to float|base 10): (.*)$|, not '?(\w+)'?$",
                detail,
            )
            what = next((group for group in given.groups() if group is not None), "") if given else detail
        return f"{key}: expected {_expected(fields[key])}, got {what.strip(chr(39))!r}"
    unknown = re.search(r"(?:Option|option) '([^']+)'|unrecognized arguments: (\S+)", message)
    if unknown:
        group = re.search(r"Group '([^']+)'", message)
        key = (f"{group[1]}." if group else "") + (unknown[1] or unknown[2]).removeprefix("--").partition("=")[0]
        near = [name for name in fields if name.endswith(f".{key}")] or difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them all"
        return f"{key}: unknown setting; {hint}"
    if match := re.search(r"following arguments are required: (.*)", message):
        return f"{match[1]}: required, not given"
    if match := re.search(r"argument --([\w.]+)(?:/\S+)?: expected", message):
        return f"{match[1]}: expected a value, none given"
    if "must be a mapping" in message:
        return "config: a group of settings must be a mapping of keys to values"
    if match := re.match(r"(?:Unexpected|Problems parsing) config:(.*)", message, re.DOTALL):
        return f"config: expected YAML lines of `key: value`, got {' '.join(match[1].split()) or 'none'}"
    return " ".join(message.split())


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values, for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of each setting of `now` that differs.

    >>> changed({"lr": 1, "lora": {"rank": 8}}, {"lr": 1, "lora": {"rank": 16}})
    [('lora.rank', 8, 16)]
    """
    found = []
    for key, value in now.items():
        old = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict):
            found += changed(old or {}, value, f"{prefix}{key}.")
        elif value != old:
            found.append((prefix + key, old, value))
    return found


def run(main: Callable[[T], None], Config: type[T], aliases: dict[str, str] | None = None) -> None:
    """Parse the command line, call `main` with it and end the process with the suite's exit codes."""

    def terminate(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    name = Path(sys.argv[0]).name
    try:
        main(parse_config(Config, aliases=aliases))
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except NothingDone as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
