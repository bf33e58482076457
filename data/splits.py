"""A split made ready for training: its photos, their cached features and their tokenised captions, in one order."""

import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, check
from data.annotations import find_data, names_splits, read_annotations
from data.features import FeatureCache, Features
from data.photos import Photo


@dataclass
class Split:
    photos: list[Photo]
    features: Features
    captions: list[list[list[int]]]
    """Token ids of each photo's captions."""
    weights: list[dict[tuple[int, ...], float]] | None = None
    """What each of a photo's captions counts in the loss, by its token ids; without them all count 1."""


Source = tuple[Path | None, Path | None]  # annotations, folder of photos


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


def prepare_split(captioner, photos: list[Photo], cache: Path, skip_bad_photos: bool = False) -> Split:
    """Encode `photos` (or find their features in `cache`) and tokenise their captions, for a models.Captioner.

    Raises UserError for captions longer than the decoder has positions for, and for photos that cannot be decoded,
    unless `skip_bad_photos`: then they are named on stderr.
    """
    ids = captioner.tokenizer([c for photo in photos for c in photo.captions], add_special_tokens=False).input_ids
    captioner.check_room(max(map(len, ids)), "annotations")
    features, good, bad = FeatureCache(captioner.encoder, cache).find(photos)
    if features is None:
        raise UserError(f"images: none of {len(photos)} photos could be decoded, such as {bad[0]}")
    if bad and not skip_bad_photos:
        check([f"photo {error}" for error in bad] + ["skip_bad_photos goes on without them"])
    for error in bad:
        print(f"skipped photo {error}", file=sys.stderr)
    rest = iter(ids)
    captions = [[next(rest) for _ in photo.captions] for photo in photos]
    return Split([photos[i] for i in good], features, [captions[i] for i in good])
