"""The feature cache: what a frozen encoder gives for each photo, kept on disk, so that no photo is encoded twice.

`FOLDER/FINGERPRINT/ab/abcd....bin` holds one array (P, D) of a photo: FINGERPRINT covers the encoder's weights, layer
and transform, the file's name is the hash of the photo's bytes. Files are written whole, so that processes may share
the folder.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import UserError
from common.files import check_output, written_whole


class FeatureCache:
    """Arrays of one `shape` (P, D), stored as `dtype` under the hashes of their photos (`LoadedPhoto.key`)."""

    def __init__(self, folder: Path, fingerprint: str, shape: tuple[int, int], dtype: type = np.float16):
        self.folder, self.shape, self.dtype = folder / fingerprint, shape, np.dtype(dtype)
        self.bytes = self.dtype.itemsize * shape[0] * shape[1]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.bin"

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        return path.is_file() and path.stat().st_size == self.bytes

    def read(self, key: str, array: np.ndarray | None = None) -> np.ndarray | None:
        """The array (P, D) of a photo, filled into `array` where given; None where its file is missing or damaged."""
        array = np.empty(self.shape, self.dtype) if array is None else array
        try:
            with self._path(key).open("rb", buffering=0) as file:
                return array if file.readinto(array) == self.bytes and not file.read(1) else None
        except OSError:
            return None

    def write(self, key: str, array: np.ndarray) -> None:
        """Keep the array (P, D) of a photo. Raises OSError where it cannot be written."""
        with written_whole(self._path(key)) as part:
            part.write_bytes(np.asarray(array, self.dtype).tobytes())

    def check_room(self, count: int) -> None:
        """Make the folder. Raises UserError where it cannot be written, or has too little room for `count` photos.

        The photos that it holds already are taken to be among them.
        """
        check_output(self.folder / "photo.bin", overwrite=True, key="features")
        count = max(0, count - sum(1 for _ in self.folder.glob("*/*.bin")))
        needed, free = self.bytes * count / 1e9, shutil.disk_usage(self.folder).free / 1e9
        if needed > free:
            raise UserError(f"features: {self.folder} needs {needed:.1f} GB for {count} photos, {free:.1f} GB are free")


class Features:
    """Cached features of some photos, in the order of `keys`, read from disk as they are asked for."""

    def __init__(self, cache: FeatureCache, keys: Sequence[str]):
        self.cache, self.keys = cache, list(keys)

    def __getitem__(self, photos: Sequence[int]) -> Tensor:
        """Indices of B photos -> (B, P, D). Raises UserError where one is no longer in the cache."""
        features = np.empty((len(photos), *self.cache.shape), self.cache.dtype)
        if any(self.cache.read(self.keys[photo], row) is None for photo, row in zip(photos, features)):
            raise UserError(f"features: {self.cache.folder} lacks photos that were in it; start the command again")
        return torch.from_numpy(features)
