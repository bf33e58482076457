"""A split made ready for training: its photos, their cached features and their tokenised captions, in one order."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, check
from data.annotations import Photo, find_data, read_annotations
from data.features import Features, photo_features


@dataclass
class Split:
    photos: list[Photo]
    features: Features
    captions: list[list[list[int]]]
    """Token ids of each photo's captions."""


Source = tuple[Path | None, Path | None]  # annotations, folder of photos


def read_splits(
    data: Path | None, train: Source, val: Source, limit: int | None = None, val_limit: int | None = None
) -> tuple[list[Photo], list[Photo]]:
    """Training and validation photos with captions, from a folder `data` or from `train` and `val`; val may be empty.

    Raises UserError, also where the photos themselves are not to be found.
    """
    if data:
        train, val = find_data(data, "train"), find_data(data, "val")
    one_file = train[0] == val[0]  # Karpathy's form and Flickr8k's: the splits are named inside
    splits = []
    for (annotations, images), name, most in ((train, "train", limit), (val, "val", val_limit)):
        photos = read_annotations(annotations, images, name if one_file else None, most) if annotations else []
        if any(photo.path is None for photo in photos):
            raise UserError(f"images: expected the folder of the photos of {annotations}, none given")
        splits.append(photos)
    return splits[0], splits[1]


def prepare_split(
    encoder, tokenizer, photos: list[Photo], cache: Path, device: torch.device, skip_bad_photos: bool = False
) -> Split:
    """Encode `photos` (or find their features in `cache`) and tokenise their captions.

    Raises UserError for photos that cannot be decoded, unless `skip_bad_photos`: then they are named on stderr.
    """
    features, good, bad = photo_features(encoder, photos, cache, device)
    if bad and not skip_bad_photos:
        check([f"photo {error}" for error in bad] + ["skip_bad_photos goes on without them"])
    for error in bad:
        print(f"skipped photo {error}", file=sys.stderr)
    photos = [photos[i] for i in good]
    captions = [caption for photo in photos for caption in photo.captions]
    ids = iter(tokenizer(captions, add_special_tokens=False).input_ids)
    return Split(photos, features, [[next(ids) for _ in photo.captions] for photo in photos])
