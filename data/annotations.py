"""Photos and their captions, in folders, lists and annotation files, whose forms are in data/forms.py."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.config import UserError, check, say
from common.files import check_apart, read_text
from data.forms import Contents, is_unicode, read_contents
from data.names import PHOTO_SUFFIXES, finder
from data.photos import Photo, first_of, is_photo

Images = Path | Sequence[Path] | None
Source = tuple[Path | None, Path | None]  # annotations, folder of photos
WANTED = "a folder of photos, photos, a list of photos, or an annotation file"


def read_annotations(
    annotations: Path, images: Images = None, split: str | None = None, limit: int | None = None, missing: bool = False
) -> list[Photo]:
    """The captioned photos of `annotations` in the file's order, captions in theirs, white space collapsed.

    `images` is their folder, or several; without it those beside the file are taken if all of the photos lie there,
    else each `path` is None. A name that is not there means the only file that is alike (`data.names`). With `missing`
    some photos may be absent: they are bad photos when they are opened. `split` is the name of a split of the file
    ('train' takes Karpathy's 'restval' too, 'dev' is 'val'), or of one of Flickr8k's lists beside it, or the path of a
    text file with one photo name a line. `limit` keeps the first so many. Photos without a caption are left out:
    COCO's lists hold some, and there is nothing to learn from them or to score against. So is the one name in
    Flickr8k's token file that is no photo.

    Raises UserError for a file that is of no known form or has faults (unknown or repeated ids, missing keys,
    captions that are no text), and for photos that are not in `images`.
    """
    contents = read_contents(annotations)
    names = [name for name, captions in contents.captions.items() if captions]
    if len(names) < len(contents.captions):
        say(f"{annotations}: {len(contents.captions) - len(names)} photos without a caption")
    if split is not None:
        names = _of_split(annotations, contents, names, split)
    names = names[:limit]
    if not names:
        raise UserError(f"{annotations}: no photo with a caption" + (f" in split {split!r}" if split else ""))
    folders = _listed(images) or _folders_beside(annotations)
    check([f"{one}: not a folder; expected the photos of {annotations}" for one in folders if not os.path.isdir(one)])
    paths = _find(names, folders)
    absent = [name for name, path in zip(names, paths) if path is None]
    if missing and any(paths):
        paths = [path or folders[0] / os.path.basename(name) for name, path in zip(names, paths)]
    elif absent:
        there = ", ".join(sorted(os.listdir(folders[0]))[:3]) or "nothing"
        check([f"{folders[0]}: {first_of(absent)} of {annotations} not there; it holds {there} ..."] * bool(images))
        paths = [None] * len(names)
    return _photos(names, paths, contents)


def find_photos(
    images: Images, limit: int | None = None, recursive: bool = False, output: Path | None = None
) -> list[Photo]:
    """The photos that `images` stands for, without captions.

    `images` is a folder (its own photos, sorted by name; with `recursive` those of its subfolders too), a photo, a text
    file with one path a line (relative to that file, or to where the script runs), or an annotation file (all of its
    photos, captioned or not, which must lie beside it), or several of these. A pattern such as `photos/*.jpg` means the
    files that it matches.
    What else a folder holds is counted on stderr.
    Raises UserError where there are none, where none of those that are named is there, and where the `output` would be
    written over one of these files.
    """
    paths = []
    for source in _listed(images):
        if os.path.isdir(source):
            found = _of_folder(source, recursive)
        elif os.path.isfile(source) and is_photo(source):
            found = [source]
        elif held := read_contents(source, captioned=False, expected=WANTED):
            found = _find(list(held.captions), _folders_beside(source))
            found = [path or source.parent / os.path.basename(name) for name, path in zip(held.captions, found)]
        else:
            lines = [Path(line.replace("\\", "/")) for line in _lines(read_text(source, WANTED))]
            found = [path if os.path.isfile(path := source.parent / line) else line for line in lines]
        if not found:
            raise UserError(f"{source}: no photos there ({' '.join(sorted(PHOTO_SUFFIXES))})")
        if not any(map(os.path.isfile, found)):
            raise UserError(f"{source}: {first_of(found)} not there; expected one path a line, or photos beside it")
        paths += found
    check_apart([output] if output else [], [*_listed(images), *paths])
    paths = list(dict.fromkeys(paths))[:limit]  # one that is named twice is one photo
    return _photos(paths, paths, Contents())


def find_data(root: Path, split: str) -> tuple[Path, Path]:
    """(annotations, folder of photos) of `split`: ROOT/SPLIT.json, and ROOT/images/SPLIT/ or else ROOT/images/.

    Raises UserError where they are not there.
    """
    annotations, own, images = root / f"{split}.json", root / "images" / split, root / "images"
    missing = [f"{annotations}: no such file, expected the captions of {split!r}"] * (not os.path.isfile(annotations))
    check(missing + [f"{images}: no such folder, expected the photos"] * (not os.path.isdir(images)))
    return annotations, own if os.path.isdir(own) else images


def read_splits(
    data: Path | None, train: Source, val: Source, limits: Sequence[int | None] = (None, None), missing: bool = False
) -> tuple[list[Photo], list[Photo]]:
    """Training and validation photos with captions, from a folder `data` or from `train` and `val`; val may be empty.

    A file that names the splits itself (Karpathy's form, Flickr8k's with its lists) serves for both.
    Raises UserError, also where the photos themselves are not to be found.
    """
    if data:
        train, val = find_data(data, "train"), find_data(data, "val")
    if val[0] is None:
        listed = os.path.isfile(train[0].parent / "Flickr_8k.trainImages.txt")
        val = (train[0] if listed or read_contents(train[0]).splits else None), val[1]
    splits = []
    for (annotations, images), name, most in ((train, "train", limits[0]), (val, "val", limits[1])):
        split = name if train[0] == val[0] else None
        photos = read_annotations(annotations, images, split, most, missing) if annotations else []
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


def _photos(names: list, paths: list, contents: Contents) -> list[Photo]:
    """Photos under their stems; those of one stem under their names, with the folders in which they differ."""
    stems, photos = [Path(name).stem for name in names], []
    counts = Counter(stems)
    folders = {os.path.dirname(os.path.abspath(name)) for name, stem in zip(names, stems) if counts[stem] > 1}
    above = os.path.commonpath(folders) if folders else ""
    for name, stem, path in zip(map(str, names), stems, paths):
        stem = stem if counts[stem] == 1 else os.path.relpath(name, above)
        if is_unicode(stem):
            photos.append(Photo(stem, path, tuple(contents.captions.get(name, ())), contents.ids.get(name, "")))
        else:
            say(f"{name!r}: left out, since the file's name is not UTF-8")
    return photos


def _listed(images: Images) -> list[Path]:
    """The paths, and of a pattern that no shell expanded those that it means."""
    images = [images] if isinstance(images, Path) else images or ()
    patterns = {one: sorted(map(Path, glob.glob(str(one)))) for one in images if not os.path.exists(one)}
    return [path for one in images for path in patterns.get(one) or [one]]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


# ------------------------------------------------------------------------------------------- where photos lie


def _of_folder(folder: Path, recursive: bool) -> list[Path]:
    """The photos of a folder by name; what else is there is counted on stderr. Hidden files and folders are no photos:
    macOS leaves ._NAME.jpg, and phones leave .thumbnails.
    """
    found = sorted(folder.rglob("*") if recursive else folder.iterdir())
    found = [path for path in found if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    paths = [path for path in found if os.path.isfile(path) and is_photo(path)]
    others = [path for path in set(found) - set(paths) if not (recursive and os.path.isdir(path))]
    subfolder = "subfolder (--recursive enters it)"
    kinds = Counter(subfolder if os.path.isdir(path) else path.suffix or "without suffix" for path in others)
    if kinds:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        say(f"{folder}: not read: {listed}")
    return paths


def _folders_beside(annotations: Path) -> list[Path]:
    """Where photos usually lie: ours, COCO's, the two of Flickr8k, and that of Flickr30k."""
    root, part = annotations.parent, annotations.stem.rpartition("_")[2]  # captions_val2017 -> val2017
    names = (f"images/{part}", "images", part, "Images", "Flicker8k_Dataset", "flickr30k_images", "")
    return [folder for folder in (*(root / name for name in names), root.parent / part) if os.path.isdir(folder)]


def _find(names: list[str], folders: list[Path]) -> list[Path | None]:
    """The files of `names` in the first of `folders` that has each, with the folders in front of a name or without.

    No name leads out of a folder; `/` as the folder reads absolute names. A name that is not there means the only file
    that is alike.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        alike = finder((one,) for one in os.listdir(folder))
        for name in (name for name in names if name not in found):
            inside = os.path.normpath(f"/{name}").lstrip("/"), alike(os.path.basename(name))
            # os.path.isfile, since Path.is_file raises on names too long for the file system, as lines of prose are
            found |= [(name, folder / one) for one in inside[::-1] if one and os.path.isfile(folder / one)]
    return list(map(found.get, names))
