"""Photos through a frozen encoder: what the cache on disk holds is read, the rest is encoded once."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import NothingDone, UserError, check
from data.features import FeatureCache, Features
from data.photos import BadPhoto, LoadedPhoto, Photo, PhotoBatches, load_photo


def open_cache(encoder, folder: Path, dtype: type = np.float16) -> FeatureCache:
    """The cache of an encoder's features below `folder`, (tokens, width) a photo."""
    return FeatureCache(folder, encoder.fingerprint(), (encoder.tokens, encoder.width), dtype)


def encode(encoder, photos: Sequence[LoadedPhoto]) -> Tensor:
    """B decoded photos -> (B, P, D), on the encoder's device. Raises UserError where a feature is no finite number."""
    features = encoder(torch.stack([encoder.transform(photo.image) for photo in photos]).to(encoder.device))
    finite = features.half().isfinite().flatten(1).all(dim=1).tolist()
    bad = [photo.photo.path or photo.stem for photo, fine in zip(photos, finite) if not fine]
    check([f"photo {name}: the encoder gives features that are too large for 16 bits, or no numbers" for name in bad])
    return features


def encode_files(
    encoder, photos: Sequence[Photo], folder: Path, batch_size: int = 32, workers: int = 2, dtype: type = np.float16
) -> tuple[Features, list[int], list[BadPhoto]]:
    """Features of `photos`, read from the cache below `folder` or encoded and added to it.

    Returns the features of the photos that could be decoded, the indices of those photos, and the errors of the others.
    Raises UserError where the cache cannot be written or the disk has too little room, NothingDone where no photo could
    be decoded.
    Each of several processes begins with its share and then finds the others' in the cache, but for what is not yet
    there. So a photo is encoded once, and no process waits for another, which may take longer than processes wait.
    """
    cache, keys = open_cache(encoder, folder, dtype), {}
    cache.check_room(len(photos))
    process, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    order = [photo for share in range(process, process + count) for photo in photos[share % count :: count]]
    batches = PhotoBatches(order, batch_size, workers, "encode photos", known=cache.__contains__)
    for batch in batches:
        keys |= {photo.stem: photo.key for photo in batch}
        new = [photo for photo in batch if photo.image is not None]
        if new:
            for photo, features in zip(new, encode(encoder, new).float().cpu().numpy()):
                cache.write(photo.key, features)
    good = [i for i, photo in enumerate(photos) if photo.stem in keys]
    if not good:
        raise NothingDone(f"none of {len(photos)} photos could be decoded")
    paths = {keys[photos[i].stem]: photos[i] for i in good}

    def anew(key: str) -> np.ndarray:
        loaded = load_photo(paths[key])
        if loaded.key != key:
            raise UserError(f"images: {loaded.photo.path} is another photo than when the run began")
        features = encode(encoder, [loaded])[0].float().cpu().numpy()
        cache.write(key, features)
        return features

    return Features(cache, [keys[photos[i].stem] for i in good], anew), good, batches.bad


class CachedEncoder:
    """An encoder that reads its cache on disk where that holds a photo, and keeps the latest batch in memory.

    A photo whose caption was generated can so be looked into without being encoded again. Nothing is added to the
    cache. Features are rounded to half precision, as cached ones are, so that captions do not depend on the cache.
    """

    def __init__(self, encoder, folder: Path | None = None):
        self.encoder, self.cache = encoder, open_cache(encoder, folder) if folder and folder.is_dir() else None
        self.latest: tuple[list[str], Tensor] = ([], torch.empty(0))

    def __call__(self, photos: Sequence[LoadedPhoto]) -> Tensor:
        """B decoded photos -> (B, P, D), on the CPU, in half precision."""
        keys = [photo.key for photo in photos]
        if keys != self.latest[0]:
            found = {key: self.cache.read(key) if self.cache else None for key in keys}
            features = {key: torch.from_numpy(array) for key, array in found.items() if array is not None}
            missing = list({photo.key: photo for photo in photos if photo.key not in features}.values())
            if missing:
                features |= zip((photo.key for photo in missing), encode(self.encoder, missing).half().cpu())
            self.latest = keys, torch.stack([features[key] for key in keys])
        return self.latest[1]
