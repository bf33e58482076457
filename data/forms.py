"""The forms in which captioned photos are published: how each is told by its content, and how it is read.

To add a form, write a function that reads it and add a line to FORMS.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from common.config import UserError, check

# Keys of a record, or columns of a table: the first of them that is there names the photo, or holds its captions.
NAMES = ("file_name", "filename", "image_name", "image_path", "image", "image_id", "id")
CAPTIONS = ("caption", "captions", "text", "sentence", "sentences", "comment")


class Fault(Exception):
    """What is wrong with one record of a file."""


class Contents:
    """What a file holds: each photo's captions, the split of some, and its faults, each with its place."""

    def __init__(self, captioned: bool = True):
        self.captioned = captioned  # else the photos alone are wanted
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.faults: list[str] = []

    def add(self, name: Any, captions: str | list = (), split: Any = None) -> str:
        """Add a photo, or captions to it, with white space collapsed; return its name. Raises Fault."""
        name = str(name).replace("\\", "/")
        known = self.captions.setdefault(name, [])
        if isinstance(split, str):
            self.splits[name] = split
        for caption in [captions] if isinstance(captions, str) else captions:
            if not isinstance(caption, str):
                raise Fault(f"caption of {name} is {caption!r:.60}, not text")
            if not caption.strip():
                raise Fault(f"caption of {name} is empty")
            if not is_unicode(caption):
                raise Fault(f"caption of {name} holds half a surrogate pair, which is no Unicode text")
            known.append(" ".join(caption.split()))
        return name

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """`with file.at(place):` keeps a Fault raised in the block, with its place, and goes on behind it."""
        try:
            yield
        except Fault as fault:
            self.faults.append(f"{place}: {fault}")


def get(record: Any, *keys: str, kind: Any = str) -> Any:
    """What `record` has under the first of `keys` that holds one of `kind`. Raises Fault where none does."""
    values = record if isinstance(record, dict) else {}
    for key in keys:
        if isinstance(values.get(key), kind) and record[key] != "":
            return record[key]
    words = {str: "text", list: "a list"}.get(kind, "a number or text")
    there = [key for key in keys if key in values] or keys
    got = values.get(there[0], record)
    raise Fault(f"expected an object with {' or '.join(there)} as {words}, got {got!r:.60}")


def has(key: str, records: Any) -> bool:
    """Whether a record has that key, or any of a list of records."""
    records = records if isinstance(records, list) else [records]
    return any(key in record for record in records if isinstance(record, dict))


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, as JSON's "\\ud800" and undecodable file names give."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


# ------------------------------------------------------------------------------------------- one reader a form


def read_coco(file: Contents, data: dict) -> None:
    names: dict[int | str, str] = {}
    name_key = "file_name" if has("file_name", data["images"]) else "id"  # some name the photos by their ids alone
    for number, image in enumerate(data["images"]):
        with file.at(f"images[{number}]"):
            key = get(image, "id", kind=(int, str))
            if key in names:
                raise Fault(f"id {key} is also the id of {names[key]}")
            names[key] = file.add(get(image, name_key, kind=(int, str)))
    annotations = get(data, "annotations", kind=list) if file.captioned else []
    if annotations and not has("caption", annotations):
        raise Fault("no annotation has a caption; expected COCO's captions, not its instances or keypoints")
    for number, record in enumerate(annotations):
        with file.at(f"annotations[{number}]"):
            caption, key = get(record, "caption"), get(record, "image_id", kind=(int, str))
            if key not in names:
                raise Fault(f"image_id {key} is the id of no image")
            file.add(names[key], caption)


def read_karpathy(file: Contents, data: dict) -> None:
    for number, image in enumerate(data["images"]):
        with file.at(f"images[{number}]"):
            name, split = get(image, "filename"), get(image, "split")
            captions = [get(sentence, "raw") for sentence in get(image, "sentences", kind=list)]
            file.add(PurePath(str(image.get("filepath") or ""), name), captions, split)


def read_records(file: Contents, data: list | dict) -> None:
    for number, record in enumerate(data if isinstance(data, list) else [data]):
        with file.at(f"records[{number}]"):
            read_record(file, record)


def read_record(file: Contents, record: Any) -> None:
    name, captions = get(record, *NAMES, kind=(int, str)), get(record, *CAPTIONS, kind=(list, str))
    file.add(name, captions, record.get("split"))


def read_tokens(file: Contents, text: str) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        with file.at(f"line {number}"):
            match = TOKEN_LINE.fullmatch(line)
            if match is None and line.strip():
                raise Fault(f"expected NAME.jpg#0<tab>caption, got {line!r:.60}")
            if match and not re.search(r"\.jpg\.\d+$", match[1]):  # the published file has one NAME.jpg.1, no photo
                file.add(match[1], match[2])


def read_table(file: Contents, text: str) -> None:
    mark = column_mark(text)
    if mark == "|":  # one row of the published Flickr30k lacks its second bar
        text = re.sub(r"^([^|\n]+\| *\d+) +(?=[^| ])", r"\1| ", text, flags=re.MULTILINE)
    # `strict`, else a quote left open would quietly swallow the rows below it into one caption
    quoting = csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL
    table = csv.reader(io.StringIO(text), delimiter=mark, quoting=quoting, strict=True)
    rows = ([cell.strip() for cell in row] for row in table if row)
    try:
        header = [column.lower() for column in next(rows)]
        for row in rows:
            with file.at(f"line {table.line_num}"):
                if len(row) != len(header):
                    raise Fault(f"{len(row)} columns, expected {len(header)} (captions with {mark!r} go in quotes)")
                read_record(file, dict(zip(header, row)))
    except csv.Error as error:
        file.faults.append(f"line {table.line_num}: {error}")


def column_mark(text: Any) -> str | None:
    """What separates the columns of a table whose header names photos and captions; None for what is no such table."""
    for mark in ",;\t|":
        columns = {column.strip(' "\r') for column in first_line(text).lower().split(mark)}
        if columns & set(NAMES) and columns & set(CAPTIONS):
            return mark
    return None


def first_line(text: Any) -> str:
    return text.lstrip().partition("\n")[0] if isinstance(text, str) else ""


def images(data: Any) -> Any:
    """The list of a COCO or Karpathy file."""
    return data.get("images") if isinstance(data, dict) else None


# ------------------------------------------------------------------------------------------- the table of forms

TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")

# A form's name; whether a file's JSON, or its text where it is no JSON, is of it (the first that says so); its reader.
FORMS: tuple[tuple[str, Callable[[Any], Any], Callable[[Contents, Any], None]], ...] = (
    ("Karpathy's JSON", lambda data: has("sentences", images(data)) and "annotations" not in data, read_karpathy),
    ("COCO's JSON ('images', 'annotations')", lambda data: isinstance(images(data), list), read_coco),
    ("JSON records of image and caption", lambda data: any(has(name, data) for name in NAMES), read_records),
    ("Flickr8k's lines NAME.jpg#0<tab>caption", lambda data: TOKEN_LINE.match(first_line(data)), read_tokens),
    ("a CSV table with columns image and caption", column_mark, read_table),
)
EXPECTED = ", ".join(name for name, _, _ in FORMS)


def parse(where: object, text: str, expected: str = EXPECTED, **options: Any) -> Any:
    """The JSON value in `text`, a list of them where each line holds an object, or `text` itself where it is no JSON.

    `options` go to `json.loads`. Raises UserError, which begins with `where`, for damaged JSON.
    """
    first, _, rest = text.lstrip().partition("\n")
    if first[:1] not in ("{", "["):
        return text
    if first.rstrip().endswith("}") and rest.lstrip().startswith("{"):  # an object a line, as no single value has it
        text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected {expected}") from None


def read_contents(where: object, text: str, captioned: bool = True) -> Contents | None:
    """What the text of a file holds. Raises UserError, which begins with `where`, for faults and unknown forms.

    With `captioned` False the photos alone are wanted: the captions of COCO's form are not read, and plain text that
    is of no form gives None.
    """
    content, file = parse(where, text), Contents(captioned)
    forms = [(name, read) for name, tells, read in FORMS if tells(content)]
    if not forms:
        if isinstance(content, str) and not captioned:
            return None
        raise UserError(f"{where}: {'not a known form' if text.strip() else 'empty'}; expected {EXPECTED}")
    name, read = forms[0]
    with file.at(name):
        read(file, content)
    check([f"{where}: {fault}" for fault in file.faults[:1]] + file.faults[1:])
    return file
