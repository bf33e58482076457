"""The feature cache: what a frozen encoder gives for each photo, kept on disk, so that no photo is encoded twice.

`FOLDER/FINGERPRINT/ab/abcd....bin` holds one array (P, D) of a photo and its CRC-32: FINGERPRINT covers the encoder's
weights, layer and transform, the file's name is the hash of the photo's bytes. Files are written whole, so that
processes may share the folder.
"""

import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import check, say
from common.files import check_output, written_whole


class FeatureCache:
    """Arrays of one `shape` (P, D), stored as `dtype` under the hashes of their photos (`LoadedPhoto.key`)."""

    def __init__(self, folder: Path, fingerprint: str, shape: tuple[int, int], dtype: type = np.float16):
        self.folder, self.shape, self.dtype = folder / fingerprint, shape, np.dtype(dtype)
        self.bytes = self.dtype.itemsize * shape[0] * shape[1] + 4  # of the CRC-32

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.bin"

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        return path.is_file() and path.stat().st_size == self.bytes

    def read(self, key: str) -> np.ndarray | None:
        """The array (P, D) of a photo; None where its file is missing or damaged."""
        if key not in self:
            return None
        content = bytearray(self._path(key).read_bytes())
        if zlib.crc32(content[:-4]).to_bytes(4) == content[-4:]:
            return np.frombuffer(content[:-4], self.dtype).reshape(self.shape)
        say(f"features: {self._path(key)} is damaged; its photo is encoded anew")
        return None

    def write(self, key: str, array: np.ndarray) -> None:
        """Keep the array (P, D) of a photo. Raises OSError where it cannot be written."""
        with written_whole(self._path(key)) as part:
            content = np.asarray(array, self.dtype).tobytes()
            part.write_bytes(content + zlib.crc32(content).to_bytes(4))

    def check_room(self, count: int) -> None:
        """Make the folder. Raises UserError where it cannot be written, or has too little room for `count` photos.

        The photos that it holds already are taken to be among them.
        """
        check_output(self.folder / "photo.bin", overwrite=True, key="features")
        count = max(0, count - sum(1 for _ in self.folder.glob("*/*.bin")))
        needed, free = self.bytes * count / 1e9, shutil.disk_usage(self.folder).free / 1e9
        wanted = f"features: {self.folder} needs {needed:.1f} GB for {count} photos, {free:.1f} GB are free"
        check([wanted] * (needed > free))


class Features:
    """Cached features of some photos, in the order of `keys`, read from disk as they are asked for.

    `encode` gives the array (P, D) of a key anew, where the cache has lost it.
    """

    def __init__(self, cache: FeatureCache, keys: Sequence[str], encode: Callable[[str], np.ndarray]):
        self.cache, self.keys, self.encode = cache, list(keys), encode

    def __getitem__(self, photos: Sequence[int]) -> Tensor:
        """Indices of B photos -> (B, P, D). Raises UserError where one is lost and its file is another by now."""
        features = np.empty((len(photos), *self.cache.shape), self.cache.dtype)
        for photo, row in zip(photos, features):
            array = self.cache.read(self.keys[photo])
            row[:] = self.encode(self.keys[photo]) if array is None else array
        return torch.from_numpy(features)
