"""The forms in which captioned photos are published: how each is told by its content, and how it is read.

To add a form, write a function that gives its records, each with its place in the file, and add a line to FORMS. A
record names a photo by one of NAMES, its captions by one of CAPTIONS, and may have a split and an id.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.config import UserError, say
from common.files import read_text

# Keys of a record, or columns of a table: the first of them that is there names the photo, or holds its captions.
NAMES = ("file_name", "filename", "image_name", "image_path", "image", "image_id", "id")
CAPTIONS = ("caption", "captions", "text", "sentence", "sentences", "comment", "reference_strs", "caption_str")
NUMBERED = re.compile(r"(caption|sentence|text)_?\d+")  # columns with a caption each
UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Lao, Japanese, Chinese characters
IDS = ("image_id", "cocoid", "imgid", "id")

Rows = Iterator[tuple[str, Any]]  # a place in the file and the record there


class Fault(Exception):
    """What is wrong with a record of a file, after the place of the record."""


class Contents:
    """What a file holds: each photo's captions, and the split and the id of some."""

    def __init__(self):
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.left_out: list[str] = []
        """Captions that are null or empty."""

    def add(self, place: str, record: Any, captioned: bool, exact: bool) -> None:
        """Add a photo and, where `captioned`, its captions. Raises Fault.

        White space is collapsed and empty captions are left out, but not where they are to stay `exact`.
        """
        name = str(get(place, record, *NAMES, kind=(int, str))).replace("\\", "/")
        known = self.captions.setdefault(name, [])
        self.ids[name] = str(next((record[key] for key in IDS if key in record), ""))
        if isinstance(record.get("split"), str):
            self.splits[name] = record["split"]
        for caption in captions_of(place, record) if captioned else ():
            if caption is None or not exact and not str(caption).strip():
                self.left_out.append(f"{place}: {name} has {'null for' if caption is None else 'an empty'} caption")
            elif not isinstance(caption, str):
                raise Fault(f"{place}: caption of {name} is {caption!r:.60}, not text")
            elif not is_unicode(name + caption):
                raise Fault(f"{place}: {name!r} or its caption holds half a surrogate pair, which is no Unicode text")
            else:
                known.append(caption if exact else " ".join(caption.split()))


def get(place: str, record: Any, *keys: str, kind: Any = str) -> Any:
    """What `record` has under the first of `keys` that holds one of `kind`. Raises Fault where none does."""
    for key in keys if isinstance(record, dict) else ():
        if isinstance(record.get(key), kind) and record[key] != "":
            return record[key]
    raise Fault(f"{place}: expected an object with {' or '.join(keys)}, got {record!r:.60}")


def captions_of(place: str, record: dict) -> list:
    """The captions of a record, which may be in a list, in several columns, or in a conversation. Raises Fault."""
    if "conversations" in record:
        turns = get(place, record, "conversations", kind=list)
        return [caption_in([get(place, turn, "value", "content") for turn in turns])]
    keys = [key for key in CAPTIONS if key in record][:1] or list(filter(NUMBERED.fullmatch, record))
    if not keys:
        raise Fault(f"{place}: no caption under {', '.join(CAPTIONS[:5])} or the like, got {record!r:.60}")
    found = record[keys[0]] if isinstance(record[keys[0]], list) else [record[key] for key in keys]
    return [one.get("raw") if isinstance(one, dict) else one for one in found]  # "raw" is Karpathy's


def caption_in(turns: list[str]) -> str | None:
    """The caption in a conversation of LLaVA or ShareGPT4V: the first answer to a turn that asks for one.

    >>> caption_in(["<image> What colour is it?", "Brown.", "<image> Describe it.", "A dog."])
    'A dog.'
    """
    asks = re.compile("(?is)(?=.*<im(age|g))(?=.*(caption|descri|summar))")
    return next((answer for question, answer in zip(turns, turns[1:]) if asks.match(question)), None)


def has(keys: Iterable[str], data: Any) -> bool:
    """Whether `data`, which may be a record or a list of records, has one of the `keys` in any of them."""
    records = data if isinstance(data, list) else [data]
    return any(key in record for record in records if isinstance(record, dict) for key in keys)


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, as JSON's "\\ud800" and undecodable file names give."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


# ------------------------------------------------------------------------------------------- the records of each form


def coco_rows(data: dict) -> Rows:
    """COCO's images and annotations, and Karpathy's images, which have their sentences themselves."""
    key = next((key for key in NAMES if has([key], data["images"])), "id")  # some name the photos by their ids alone
    names: dict[int | str, str] = {}
    for number, image in enumerate(get("the file", data, "images", kind=list)):
        place = f"images[{number}]"
        name = str(get(place, image, key, kind=(int, str)))
        name = os.path.join(str(image.get("filepath") or ""), name)
        id = get(place, image, "id", kind=(int, str)) if "id" in image else name
        if id in names:
            raise Fault(f"{place}: id {id} is also the id of {names[id]}")
        names[id] = name
        yield place, image | {"file_name": name, "caption": image.get("sentences", [])}
    for number, annotation in enumerate(get("the file", {"annotations": []} | data, "annotations", kind=list)):
        place = f"annotations[{number}]"
        id = get(place, annotation, "image_id", kind=(int, str))
        if id not in names:
            raise Fault(f"{place}: image_id {id} is the id of no image")
        yield place, annotation | {"file_name": names[id]}


def json_rows(data: list | dict) -> Rows:
    return ((f"records[{number}]", record) for number, record in enumerate(records(data)))


def object_rows(data: dict[str, Any]) -> Rows:
    return ((f"{name!r:.60}", {"image": name, "caption": captions}) for name, captions in data.items())


def token_rows(text: str) -> Rows:
    text = re.sub(r"(?m)^.*\.jpg\.\d+#.*$", "", text)  # the published file has one NAME.jpg.1, which is no photo
    return table_rows(re.sub(r"#\d+\t", "\t", text), "\t", ["image", "caption"])


def table_rows(text: str, mark: str | None = None, header: list[str] | None = None) -> Rows:
    mark = mark or column_mark(text)
    if mark == "|":  # one row of the published Flickr30k lacks its second bar
        text = re.sub(r"^([^|\n]+\| *\d+) +(?=[^| ])", r"\1| ", text, flags=re.MULTILINE)
    # `strict`, else a quote left open would quietly swallow the rows below it into one caption
    quoting = csv.QUOTE_NONE if mark == "|" or header else csv.QUOTE_MINIMAL
    table = csv.reader(io.StringIO(text), delimiter=mark, quoting=quoting, strict=True)
    try:
        for cells in ([cell.strip() for cell in row] for row in table):
            if not header:
                header = [column.lower() for column in cells]
            elif len(cells) == len(header) and any(cells):
                yield f"line {table.line_num}", dict(zip(header, cells))
            elif any(cells):
                raise Fault(f"line {table.line_num}: {len(cells)} columns, expected {len(header)}, got {cells!r:.60}")
    except csv.Error as error:
        raise Fault(f"line {table.line_num}: {error}") from None


def column_mark(text: Any) -> str | None:
    """What separates the columns of a table whose header names photos and captions; None for what is no such table."""
    header = text.lstrip().partition("\n")[0].lower() if isinstance(text, str) else ""
    for mark in ",;\t|":
        columns = {column.strip(' "\r') for column in header.split(mark)}
        if columns & set(NAMES) and (columns & set(CAPTIONS) or any(map(NUMBERED.fullmatch, columns))):
            return mark
    return None


def records(data: Any) -> list:
    """The records in JSON data: a list, the first list of records in an object, or the object if it is a record."""
    if not isinstance(data, dict):
        return data
    lists = [value for value in data.values() if isinstance(value, list) and has(NAMES, value)]
    return lists[0] if lists else [data] if has(CAPTIONS, data) else []


# ------------------------------------------------------------------------------------------- the table of forms

# A form's name; whether a file's JSON, or its text where it is no JSON, is of it (the first that says so); its records.
FORMS: tuple[tuple[str, Callable[[Any], Any], Callable[[Any], Rows]], ...] = (
    ("COCO's or Karpathy's 'images'", lambda data: isinstance(data, dict) and "images" in data, coco_rows),
    ("JSON records of image and caption", lambda data: has(NAMES, records(data)), json_rows),
    ("a JSON object {photo: caption or captions}", lambda data: data and isinstance(data, dict), object_rows),
    ("Flickr8k's lines NAME.jpg#0<tab>caption", lambda data: re.match(r"\s*[^\t\n]+#\d+\t", str(data)), token_rows),
    ("a CSV table with columns image and caption", column_mark, table_rows),
)
EXPECTED = ", ".join(name for name, _, _ in FORMS)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that stands there twice, of which a dict would keep one value."""
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return dict(pairs)


def parse(where: object, text: str, expected: str = EXPECTED) -> Any:
    """The JSON value in `text`, a list of them where each line holds an object, or `text` itself where it is no JSON.

    Raises UserError, which begins with `where`, for damaged JSON.
    """
    first, _, rest = text.lstrip().partition("\n")
    if first[:1] not in ("{", "["):
        return text
    if first.rstrip().endswith("}") and rest.lstrip().startswith("{"):  # an object a line, as no single value has it
        text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected {expected}") from None


def read_contents(path: Path, captioned: bool = True, exact: bool = False, expected: str = EXPECTED) -> Contents | None:
    """What a file holds. Raises UserError for faults and unknown forms; says on stderr which captions are empty.

    With `captioned` False the photos alone are wanted: captions are not read, and plain text of no form gives None.
    With `exact` captions are predictions, which stay as they are and may be empty.
    """
    content = parse(path, read_text(path, expected))
    rows = next((rows for _, tells, rows in FORMS if tells(content)), None)
    if rows is None:
        if isinstance(content, str) and not captioned:
            return None
        raise UserError(f"{path}: {'not a known form' if content else 'empty'}; expected {expected}")
    contents = Contents()
    try:
        for place, record in rows(content):
            contents.add(place, record, captioned, exact)
    except Fault as fault:
        raise UserError(f"{path}: {fault}") from None
    if contents.left_out:
        some = "; ".join(contents.left_out[:3])
        say(f"{path}: {len(contents.left_out)} captions left out: {some}")
    return contents
