"""Photos and their captions, from the four forms in which captioning data is published, told apart by content.

COCO          {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy      {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}
Flickr8k      lines `NAME.jpg#0<tab>caption`, with lists of the photos of each split
CSV           rows of `image,caption` below that header
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import UserError, check
from data.photos import PHOTO_SUFFIXES, Photo

FORMS = (
    "COCO captions or Karpathy's dataset as JSON, Flickr8k token lines (NAME.jpg#0<tab>caption), "
    "or CSV with the header image,caption"
)


@dataclass
class _Entry:
    """A photo as an annotation file names it."""

    name: str
    split: str | None = None
    captions: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------- what scripts call


def read_annotations(
    annotations: Path, images: Path | None = None, split: str | None = None, limit: int | None = None
) -> list[Photo]:
    """The captioned photos of `annotations` in the file's order, captions in theirs, white space collapsed.

    `images` is their folder; without it one beside the file is taken if all of the photos lie there, else each
    `path` is None. `split` is the name of a split of the file ('train' takes Karpathy's 'restval' too, 'dev' is
    'val'), or of one of Flickr8k's lists beside it, or the path of a text file with one photo name a line.
    `limit` keeps the first so many. Photos without a caption are left out: COCO's lists hold some, and there is
    nothing to learn from them or to score against. So is the one name in Flickr8k's token file that is no photo.

    Raises UserError for a file that is not of the four forms or has faults (unknown or repeated ids, missing keys,
    captions that are empty or no text), photos that are not in `images`, and two photos of one stem.
    """
    entries = [entry for entry in _entries(annotations, read_text(annotations, FORMS)) if entry.captions]
    if split is not None:
        entries = _of_split(annotations, entries, split)
    entries = entries[:limit]
    if not entries:
        raise UserError(f"{annotations}: no photo with a caption" + (f" in split {split!r}" if split else ""))
    names = [entry.name for entry in entries]
    if images is None:
        paths = _beside(annotations, names) or [None] * len(names)
    elif not images.is_dir():
        raise UserError(f"{images}: not a folder; expected the photos of {annotations}")
    else:
        paths = [_in_folder(images, name) for name in names]
        missing = [name for name, path in zip(names, paths) if path is None]
        if missing:
            raise UserError(f"{images}: {_count(missing)} of {annotations} not there: {_first(missing)}")
    return _photos(names, paths, (entry.captions for entry in entries))


def names_splits(annotations: Path) -> bool:
    """Whether `annotations` is cut into splits itself, by Karpathy's field or by Flickr8k's lists beside it."""
    listed = (annotations.parent / "Flickr_8k.trainImages.txt").is_file()
    return listed or any(entry.split for entry in _entries(annotations, read_text(annotations, FORMS)))


def find_photos(images: Path, limit: int | None = None) -> list[Photo]:
    """The photos that `images` stands for, without captions.

    `images` is a folder (its own photos, sorted by name), one photo, a text file with one path a line (relative to
    that file), or an annotation file (all of its photos, captioned or not, which must lie beside it).
    Raises UserError where there are none, where a named one is not there, and for two photos of one stem.
    """
    if images.is_dir():
        paths = sorted(
            path
            for path in images.iterdir()
            if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )  # macOS leaves ._NAME.jpg beside NAME.jpg
        paths = paths[:limit]
    elif images.suffix.lower() in PHOTO_SUFFIXES and images.is_file():
        paths = [images]
    elif _form(text := read_text(images, "photos: a folder, a photo, a list or an annotation file")):
        names = [entry.name for entry in _entries(images, text, captioned=False)][:limit]
        paths = _beside(images, names)
        if paths is None:
            looked = ", ".join(str(folder) for folder in _folders_beside(images) if folder.is_dir())
            raise UserError(
                f"{images}: its photos ({_first(names)}) do not all lie in one folder beside it; looked in {looked}"
            )
    else:
        paths = [images.parent / line for line in _lines(text)][:limit]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{images}: {_count(missing)} not there: {_first(missing)}; expected one path a line")
    if not paths:
        raise UserError(f"{images}: no photos there ({' '.join(sorted(PHOTO_SUFFIXES))})")
    return _photos([str(path) for path in paths], paths)


def find_data(root: Path, split: str) -> tuple[Path, Path]:
    """(annotations, folder of photos) of `split`: ROOT/SPLIT.json, and ROOT/images/SPLIT/ or else ROOT/images/.

    Raises UserError where they are not there.
    """
    annotations, images = root / f"{split}.json", root / "images" / split
    if not images.is_dir():
        images = root / "images"
    problems = [] if annotations.is_file() else [f"{annotations}: no such file, expected the captions of {split!r}"]
    if not images.is_dir():
        problems.append(f"{images}: no such folder, expected the photos")
    check(problems)
    return annotations, images


# ------------------------------------------------------------------------------------------- photos and files


def read_text(path: Path, expected: str = "a text file") -> str:
    """The UTF-8 text of `path` (a byte order mark is dropped). Raises UserError saying what was `expected`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; expected {expected}") from None
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; expected {expected}") from None


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, as JSON's "\\ud800" and undecodable file names give."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _count(missing: list) -> str:
    return f"{len(missing)} photo{'s' if len(missing) > 1 else ''}"


def _first(names: Iterable, shown: int = 3) -> str:
    names = [str(name)[-120:] for name in names]
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _photos(names: list[str], paths: list, captions: Iterable[Iterable[str]] | None = None) -> list[Photo]:
    """Photos under their stems, which must differ, and be text that a JSON file can hold."""
    stems: dict[str, str] = {}
    problems = []
    for name in names:
        stem = Path(name).stem
        if stem in stems:
            problems.append(
                f"{stems[stem]!r} and {name!r}: two photos with the stem {stem!r}, by which captions are kept"
            )
        elif not is_unicode(stem):
            problems.append(f"{name!r}: the file's name is not UTF-8")
        stems[stem] = name
    check(problems)
    return [
        Photo(Path(name).stem, path, tuple(of_photo))
        for name, path, of_photo in zip(names, paths, captions or [()] * len(names))
    ]


def _in_folder(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, with the folders in front of the name (COCO's `val2014/`) or without them."""
    # os.path.isfile, since Path.is_file raises on names too long for the file system, as lines of prose are
    return next((path for path in (folder / name, folder / Path(name).name) if os.path.isfile(path)), None)


def _folders_beside(annotations: Path) -> list[Path]:
    """Where the photos of an annotation file are usually kept: ours, COCO's and the two of Flickr8k."""
    root, part = annotations.parent, annotations.stem.rpartition("_")[2]  # captions_val2017 -> val2017
    return [
        root / "images" / part,
        root / "images",
        root / part,
        root.parent / part,
        root / "Images",
        root / "Flicker8k_Dataset",
        root,
    ]


def _beside(annotations: Path, names: list[str]) -> list[Path] | None:
    for folder in filter(Path.is_dir, _folders_beside(annotations)):
        paths = []
        for name in names:
            paths.append(_in_folder(folder, name))
            if paths[-1] is None:
                break
        else:
            return paths
    return None


# ------------------------------------------------------------------------------------------- splits


def _of_split(annotations: Path, entries: list[_Entry], split: str) -> list[_Entry]:
    own = {entry.split for entry in entries if entry.split is not None}
    named = "val" if split == "dev" else split
    if named in own:
        wanted = {"train", "restval"} if named == "train" else {named}
        return [entry for entry in entries if entry.split in wanted]
    flickr = {"train": "train", "val": "dev", "test": "test"}.get(named)
    lists = [Path(split)] + [annotations.parent / f"Flickr_8k.{flickr}Images.txt"] * (flickr is not None)
    found = next((path for path in lists if os.path.isfile(path)), None)
    if found is None:
        has = f"its splits are {', '.join(sorted(own))}" if own else f"no list {lists[-1].name} beside it"
        raise UserError(f"split: {split!r} is neither a split of {annotations} ({has}) nor a file that lists photos")
    listed = set(_lines(read_text(found)))
    unknown = sorted(listed - {entry.name for entry in entries})
    check([f"{found}: {name} has no caption in {annotations}" for name in unknown])
    return [entry for entry in entries if entry.name in listed]


# ------------------------------------------------------------------------------------------- the four forms


def _form(text: str) -> str | None:
    first = text.lstrip().partition("\n")[0]
    if first[:1] in ("{", "["):
        return "json"
    if TOKEN_LINE.match(first):
        return "token"
    columns = _csv_columns(first.replace('"', "").split(","))
    return "csv" if {"image", "caption"} <= set(columns) else None


def _entries(path: Path, text: str, captioned: bool = True) -> list[_Entry]:
    """Every photo that the file names; with `captioned` False its captions may be missing and are not read (COCO)."""
    problems: list[str] = []
    form = _form(text)
    if form == "token":
        entries = _token_file(text, problems)
    elif form == "csv":
        entries = _csv_file(text, problems)
    elif form == "json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); expected {FORMS}") from None
        images = data.get("images") if isinstance(data, dict) else None
        if not isinstance(images, list):
            raise UserError(f"{path}: JSON without a list 'images'; expected {FORMS}")
        if "annotations" not in data and any(isinstance(image, dict) and "sentences" in image for image in images):
            entries = _karpathy(images, problems)
        else:
            entries = _coco_photos(images, problems)
            if captioned:
                _add_coco_captions(path, data, entries, problems)
            entries = list(entries.values())
    else:
        raise UserError(f"{path}: {'not a known form' if text.strip() else 'empty'}; expected {FORMS}")
    if problems:
        check([f"{path}: {problems[0]}", *problems[1:]])
    return entries


def _get(record: Any, key: str, kind: type | tuple[type, ...], where: str, problems: list[str]) -> Any:
    """record[key], or None and one more of `problems` where it is missing or not of `kind`."""
    if not isinstance(record, dict):
        problems.append(f"{where}: expected an object, got {record!r:.60}")
    elif key not in record:
        problems.append(f"{where}: key {key!r} is missing")
    elif not isinstance(record[key], kind) or record[key] == "":
        kinds = " or ".join(
            {str: "text", int: "a number", list: "a list"}[one]
            for one in (kind if isinstance(kind, tuple) else (kind,))
        )
        problems.append(f"{where}: {key} must be {kinds}, got {record[key]!r:.60}")
    else:
        return record[key]
    return None


def _add_caption(entry: _Entry, caption: str, where: str, problems: list[str]) -> None:
    caption = " ".join(caption.split())
    if not caption:
        problems.append(f"{where}: empty caption of {entry.name}")
    elif not is_unicode(caption):
        problems.append(f"{where}: caption of {entry.name} holds a lone surrogate, which is no Unicode text")
    else:
        entry.captions.append(caption)


def _coco_photos(images: list, problems: list[str]) -> dict[int | str, _Entry]:
    entries: dict[int | str, _Entry] = {}
    for index, image in enumerate(images):
        where = f"images[{index}]"
        number = _get(image, "id", (int, str), where, problems)
        name = _get(image, "file_name", str, where, problems) if isinstance(image, dict) else None
        if number in entries:
            problems.append(f"{where}: id {number} is also the id of {entries[number].name}")
        elif number is not None and name is not None:
            entries[number] = _Entry(name)
    return entries


def _add_coco_captions(path: Path, data: dict, entries: dict[int | str, _Entry], problems: list[str]) -> None:
    annotations = data.get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{path}: JSON without a list 'annotations'; expected {FORMS}")
    if annotations and not any(isinstance(record, dict) and "caption" in record for record in annotations):
        raise UserError(
            f"{path}: no annotation has a caption; expected COCO's captions_*.json, not its instances or keypoints"
        )
    faulty = bool(problems)  # then unknown ids follow from the faults already found
    for index, record in enumerate(annotations):
        where = f"annotations[{index}]"
        caption = _get(record, "caption", str, where, problems)
        number = _get(record, "image_id", (int, str), where, problems) if isinstance(record, dict) else None
        if number is not None and number not in entries and not faulty:
            problems.append(f"{where}: image_id {number} is the id of no image")
        elif number in entries and caption is not None:
            _add_caption(entries[number], caption, where, problems)


def _karpathy(images: list, problems: list[str]) -> list[_Entry]:
    entries = []
    for index, image in enumerate(images):
        where = f"images[{index}]"
        name = _get(image, "filename", str, where, problems)
        if name is None:
            continue
        split = _get(image, "split", str, where, problems)
        entry = _Entry(str(Path(str(image.get("filepath") or ""), name)), split)
        for place, sentence in enumerate(_get(image, "sentences", list, where, problems) or []):
            raw = _get(sentence, "raw", str, f"{where}.sentences[{place}]", problems)
            if raw is not None:
                _add_caption(entry, raw, where, problems)
        entries.append(entry)
    return entries


TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")


def _token_file(text: str, problems: list[str]) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        match = TOKEN_LINE.fullmatch(line)
        if match is None:
            if line.strip():
                problems.append(f"line {number}: expected NAME.jpg#0<tab>caption, got {line!r:.60}")
        elif not re.search(r"\.jpg\.\d+$", match[1]):  # the published file captions one NAME.jpg.1, which is no photo
            _add_caption(entries.setdefault(match[1], _Entry(match[1])), match[2], f"line {number}", problems)
    return list(entries.values())


def _csv_columns(row: list[str]) -> list[str]:
    return [column.strip().lower() for column in row]


def _csv_file(text: str, problems: list[str]) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    # `strict`, else a quote left open would quietly swallow the rows below it into one caption
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = _csv_columns(next(row for row in reader if row))
        for row in reader:
            where = f"line {reader.line_num}"
            if row and len(row) != len(header):
                problems.append(
                    f"{where}: {len(row)} columns, expected {len(header)} (captions with commas go in quotes)"
                )
            elif row:
                name = row[header.index("image")].strip()
                if not name:
                    problems.append(f"{where}: no image name")
                    continue
                _add_caption(entries.setdefault(name, _Entry(name)), row[header.index("caption")], where, problems)
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    return list(entries.values())
