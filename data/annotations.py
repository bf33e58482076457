"""Photos and their captions, in folders, lists and annotation files, whose forms are in data/forms.py."""

import os
import sys
from collections import Counter
from itertools import takewhile
from pathlib import Path

from common.config import UserError, check
from common.files import read_text
from data.forms import EXPECTED, Contents, is_unicode, read_contents
from data.photos import PHOTO_SUFFIXES, Photo, first_of

Source = tuple[Path | None, Path | None]  # annotations, folder of photos


def read_annotations(
    annotations: Path, images: Path | None = None, split: str | None = None, limit: int | None = None
) -> list[Photo]:
    """The captioned photos of `annotations` in the file's order, captions in theirs, white space collapsed.

    `images` is their folder; without it one beside the file is taken if all of the photos lie there, else each
    `path` is None. `split` is the name of a split of the file ('train' takes Karpathy's 'restval' too, 'dev' is
    'val'), or of one of Flickr8k's lists beside it, or the path of a text file with one photo name a line.
    `limit` keeps the first so many. Photos without a caption are left out: COCO's lists hold some, and there is
    nothing to learn from them or to score against. So is the one name in Flickr8k's token file that is no photo.

    Raises UserError for a file that is of no known form or has faults (unknown or repeated ids, missing keys,
    captions that are empty or no text), photos that are not in `images`, and two photos of one stem.
    """
    contents = read_contents(annotations, read_text(annotations, EXPECTED))
    names = [name for name, captions in contents.captions.items() if captions]
    if split is not None:
        names = _of_split(annotations, contents, names, split)
    names = names[:limit]
    if not names:
        raise UserError(f"{annotations}: no photo with a caption" + (f" in split {split!r}" if split else ""))
    if images is not None and not os.path.isdir(images):
        raise UserError(f"{images}: not a folder; expected the photos of {annotations}")
    if images is None:
        paths = _beside(annotations, names) or [None] * len(names)
    else:
        paths = [_in_folder(images, name) for name in names]
        missing = [name for name, path in zip(names, paths) if path is None]
        if missing:
            raise UserError(f"{images}: {first_of(missing)} of {annotations} not there")
    return _photos(names, paths, contents.captions)


def find_photos(images: Path, limit: int | None = None) -> list[Photo]:
    """The photos that `images` stands for, without captions.

    `images` is a folder (its own photos, sorted by name), one photo, a text file with one path a line (relative to
    that file), or an annotation file (all of its photos, captioned or not, which must lie beside it). What else a
    folder holds is counted on stderr.
    Raises UserError where there are none, where a named one is not there, and for two photos of one stem.
    """
    if os.path.isdir(images):
        paths = _of_folder(images)[:limit]
    elif images.suffix.lower() in PHOTO_SUFFIXES and os.path.isfile(images):
        paths = [images]
    else:
        text = read_text(images, "a folder of photos, a photo, a list of photos, or an annotation file")
        contents = read_contents(images, text, captioned=False)
        names = list(contents.captions if contents else _lines(text))[:limit]
        paths = (contents and _beside(images, names)) or [images.parent / name for name in names]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            expected = "all photos in one folder beside it" if contents else "one path a line"
            raise UserError(f"{images}: {first_of(missing)} not there; expected {expected}")
    if not paths:
        raise UserError(f"{images}: no photos there ({' '.join(sorted(PHOTO_SUFFIXES))})")
    return _photos([str(path) for path in paths], paths)


def find_data(root: Path, split: str) -> tuple[Path, Path]:
    """(annotations, folder of photos) of `split`: ROOT/SPLIT.json, and ROOT/images/SPLIT/ or else ROOT/images/.

    Raises UserError where they are not there.
    """
    annotations, images = root / f"{split}.json", root / "images" / split
    if not os.path.isdir(images):
        images = root / "images"
    missing = [f"{annotations}: no such file, expected the captions of {split!r}"] * (not os.path.isfile(annotations))
    check(missing + [f"{images}: no such folder, expected the photos"] * (not os.path.isdir(images)))
    return annotations, images


def names_splits(annotations: Path) -> bool:
    """Whether `annotations` is cut into splits itself, by a field or by Flickr8k's lists beside it."""
    listed = os.path.isfile(annotations.parent / "Flickr_8k.trainImages.txt")
    return listed or bool(read_contents(annotations, read_text(annotations, EXPECTED)).splits)


def read_splits(
    data: Path | None, train: Source, val: Source, limit: int | None = None, val_limit: int | None = None
) -> tuple[list[Photo], list[Photo]]:
    """Training and validation photos with captions, from a folder `data` or from `train` and `val`; val may be empty.

    A file that names the splits itself (Karpathy's form, Flickr8k's with its lists) serves for both.
    Raises UserError, also where the photos themselves are not to be found.
    """
    if data:
        train, val = find_data(data, "train"), find_data(data, "val")
    if val[0] is None and names_splits(train[0]):
        val = train[0], val[1]
    splits = []
    for (annotations, images), name, most in ((train, "train", limit), (val, "val", val_limit)):
        split = name if train[0] == val[0] else None
        photos = read_annotations(annotations, images, split, most) if annotations else []
        if any(photo.path is None for photo in photos):
            raise UserError(f"images: expected the folder of the photos of {annotations}, none given")
        splits.append(photos)
    return splits[0], splits[1]


# ------------------------------------------------------------------------------------------- names and captions


def _of_split(annotations: Path, contents: Contents, names: list[str], split: str) -> list[str]:
    splits, asked = set(contents.splits.values()), "val" if split == "dev" else split
    if asked in splits:
        wanted = {"train", "restval"} if asked == "train" else {asked}
        return [name for name in names if contents.splits.get(name) in wanted]
    beside = f"Flickr_8k.{'dev' if asked == 'val' else asked}Images.txt"
    file = Path(split) if os.path.isfile(split) else annotations.parent / beside
    if not os.path.isfile(file):
        has = f"its splits are {', '.join(sorted(splits))}" if splits else f"no list {beside} beside it"
        raise UserError(f"split: {split!r} is neither a split of {annotations} ({has}) nor a file that lists photos")
    listed = set(_lines(read_text(file)))
    check([f"{file}: {name} has no caption in {annotations}" for name in sorted(listed - set(names))])
    return [name for name in names if name in listed]


def _photos(names: list[str], paths: list, captions: dict[str, list[str]] | None = None) -> list[Photo]:
    """Photos under their stems, which must differ, and be text that a JSON file can hold."""
    photos = [Photo(Path(name).stem, path, tuple((captions or {}).get(name, ()))) for name, path in zip(names, paths)]
    counts = Counter(photo.stem for photo in photos)
    check([f"{name!r}: the file's name is not UTF-8" for name in names if not is_unicode(Path(name).stem)])
    twice = [name for name in names if counts[Path(name).stem] > 1]
    check([f"{name}: not the only photo with the stem {Path(name).stem!r}, its key" for name in twice])
    return photos


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


# ------------------------------------------------------------------------------------------- where photos lie


def _of_folder(folder: Path) -> list[Path]:
    """The photos of a folder by name; what else is there is counted on stderr."""
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # macOS leaves ._NAME.jpg
    except OSError as error:
        raise UserError(f"{folder}: {(error.strerror or str(error)).lower()}; expected a folder of photos") from None
    paths = [path for path in found if path.suffix.lower() in PHOTO_SUFFIXES and os.path.isfile(path)]
    others = set(found) - set(paths)
    if others:
        kinds = Counter("folder" if os.path.isdir(path) else path.suffix or "without suffix" for path in others)
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        print(f"{folder}: not read: {listed}", file=sys.stderr)
    return paths


def _in_folder(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, with the folders in front of the name (COCO's `val2014/`) or without them."""
    # os.path.isfile, since Path.is_file raises on names too long for the file system, as lines of prose are
    return next((path for path in (folder / name, folder / Path(name).name) if os.path.isfile(path)), None)


def _beside(annotations: Path, names: list[str]) -> list[Path] | None:
    """The files of all `names` in one folder where the photos of an annotation file are usually kept.

    Such folders are ours, COCO's, the two of Flickr8k, and that of Flickr30k.
    """
    root, part = annotations.parent, annotations.stem.rpartition("_")[2]  # captions_val2017 -> val2017
    inside = (f"images/{part}", "images", part, "Images", "Flicker8k_Dataset", "flickr30k_images", "")
    for folder in (*(root / name for name in inside), root.parent / part):
        paths = list(takewhile(bool, (_in_folder(folder, name) for name in names)))
        if len(paths) == len(names):
            return paths
    return None
