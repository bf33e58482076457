"""The feature cache: a frozen encoder sees each photo once a machine, not once an epoch.

`FOLDER/FINGERPRINT/features.f16` holds one float16 array (P, D) a photo, end to end (or `features.f32`, what CLIPScore
reads, float32); the line of the same number in `index.txt` is the hash of that photo's file. FINGERPRINT covers the
encoder's weights, layer and transform.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.config import UserError
from common.files import written_whole
from data.photos import BadPhoto, Photo, load_photos


class Features:
    """Cached features of some photos, read from disk as they are asked for."""

    def __init__(self, file: Path, rows: Sequence[int], shape: tuple[int, int], dtype: type = np.float16):
        self.rows = np.asarray(rows, dtype=np.int64)
        # no more than is asked for: another run may be appending
        self._array = np.memmap(file, dtype=dtype, mode="r", shape=(int(self.rows.max()) + 1, *shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, photos: Sequence[int]) -> Tensor:
        """Indices of B photos -> (B, P, D)."""
        return torch.from_numpy(self._array[self.rows[list(photos)]])


def file_hash(path: Path) -> str | BadPhoto:
    """Hash of a file's bytes, or why it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        return BadPhoto(path, (error.strerror or str(error)).lower())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, whichever process it is in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(f"features: {folder} cannot be written: {error.strerror}") from None
    with lock:
        yield


class FeatureCache:
    """The features that one encoder gives, kept in `folder`.

    `encoder` is a models.encoder.FrozenEncoder, or what has its fingerprint, transform, device, tokens and width.
    """

    def __init__(self, encoder, folder: Path, dtype: type = np.float16):
        self.encoder, self.dtype = encoder, dtype
        self.store = folder / encoder.fingerprint()
        self.shape = (encoder.tokens, encoder.width)
        self.row_bytes = np.dtype(dtype).itemsize * encoder.tokens * encoder.width
        self.data, self.index = self.store / f"features.f{8 * np.dtype(dtype).itemsize}", self.store / "index.txt"

    def _keys(self) -> list[str]:
        """Keys of the rows that are whole in both files."""
        if not self.index.exists() or not self.data.exists():
            return []
        return self.index.read_text().rpartition("\n")[0].split()[: self.data.stat().st_size // self.row_bytes]

    def _mended_keys(self) -> list[str]:
        """The same, once what a killed run or a full disk left half is cut off."""
        keys = self._keys()
        lines = "".join(f"{key}\n" for key in keys)
        if not self.index.exists() or self.index.read_text() != lines:
            with written_whole(self.index) as part:
                part.write_text(lines)
        with self.data.open("ab") as file:
            file.truncate(self.row_bytes * len(keys))
        return keys

    def find(
        self, photos: Sequence[Photo], batch_size: int = 32, workers: int = 2
    ) -> tuple[Features | None, list[int], list[BadPhoto]]:
        """Features of `photos`, taken from the cache or added to it.

        Returns the features of the photos that could be decoded (None where none could), those photos' indices, and
        the others' errors. Raises UserError where the folder cannot be written, or has no room for what is added.
        """
        with _locked(self.store):
            try:
                keys = self._mended_keys()
            except OSError as error:
                raise UserError(f"features: {error.filename} cannot be opened: {error.strerror}") from None
            known = {key: row for row, key in enumerate(keys)}
            hashes = [file_hash(photo.path) for photo in photos]
            missing = {key: photo for key, photo in zip(hashes, photos) if isinstance(key, str) and key not in known}
            needed, free = self.row_bytes * len(missing), shutil.disk_usage(self.store).free
            if needed > free:
                raise UserError(
                    f"features: {self.store} needs {needed / 1e9:.1f} GB for {len(missing)} photos, "
                    f"{free / 1e9:.1f} GB are free"
                )
            reasons: dict[str, str] = {}  # hash of a photo that cannot be decoded -> why
            with self.data.open("ab") as features, self.index.open("a") as lines:
                batches = _decoded_batches(missing, batch_size, workers, self.encoder.transform, reasons)
                total = -(-len(missing) // batch_size)
                for batch in tqdm(batches, total=total, desc="encode photos", disable=not missing):
                    pixels = torch.stack([pixels for _, pixels in batch]).to(self.encoder.device)
                    self.encoder(pixels).float().cpu().numpy().astype(self.dtype).tofile(features)
                    features.flush()
                    lines.writelines(f"{key}\n" for key, _ in batch)
                    lines.flush()
                    for key, _ in batch:
                        known[key] = len(known)
        good = [i for i, key in enumerate(hashes) if isinstance(key, str) and key in known]
        bad = [
            key if isinstance(key, BadPhoto) else BadPhoto(photo.path, reasons[key])
            for key, photo in zip(hashes, photos)
            if isinstance(key, BadPhoto) or key in reasons
        ]
        rows = [known[hashes[i]] for i in good]
        return Features(self.data, rows, self.shape, self.dtype) if good else None, good, bad

    @cached_property
    def _stored(self) -> dict[str, np.ndarray]:
        """What is in the cache now, (P, D) by hash: read without its lock, since rows are only ever added."""
        keys = self._keys()
        rows = np.memmap(self.data, self.dtype, mode="r", shape=(len(keys), *self.shape)) if keys else ()
        return dict(zip(keys, rows))

    def see(self, photos: Sequence[Photo], images: Sequence[Image.Image]) -> Tensor:
        """B photos, already decoded -> (B, P, D), encoded where the cache lacks them; it is left as it is.

        In half precision in any case, so that what comes of it does not depend on the cache.
        """
        keys = {photo.path: file_hash(photo.path) for photo in photos}
        seen = {
            path: torch.from_numpy(np.array(self._stored[key]))
            for path, key in keys.items()
            if isinstance(key, str) and key in self._stored
        }
        missing = {photo.path: image for photo, image in zip(photos, images) if photo.path not in seen}
        if missing:
            pixels = torch.stack([self.encoder.transform(image) for image in missing.values()])
            seen |= zip(missing, self.encoder(pixels.to(self.encoder.device)).half().cpu())
        return torch.stack([seen[photo.path] for photo in photos])


def _decoded_batches(
    missing: dict[str, Photo], batch_size: int, workers: int, transform, reasons: dict[str, str]
) -> Iterator[list[tuple[str, Tensor]]]:
    batch: list[tuple[str, Tensor]] = []
    for key, (_, image) in zip(missing, load_photos(missing.values(), workers)):
        if isinstance(image, BadPhoto):
            reasons[key] = image.reason
            continue
        batch.append((key, transform(image)))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
