"""Photos: their files read and decoded to upright RGB images, one by one or in batches, the unreadable ones named."""

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common.config import UserError, one_line, say
from data.names import PHOTO_SUFFIXES
from data.prefetch import prefetch

# Named, since otherwise PIL also runs Ghostscript on PostScript, and registers formats late, a race between threads.
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"]
with suppress(ImportError):  # HEIC, as phones write it, where pillow-heif is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS.append("HEIF")

PIXELS = 2**22  # of a photo in memory; a larger one is shrunk as it is decoded, so that a batch of them has room
SHORT_EDGE = 512  # px, which shrinking leaves: more than encoders read
LONGEST = 500  # times the short edge; resizing to an encoder's input makes gigabytes of a longer strip
Image.MAX_IMAGE_PIXELS = 110_000_000  # PIL refuses twice as many: phones make photos of 200 megapixels

# Damaged EXIF and large photos make PIL warn though the photo reads well. A filter that stands, since
# `warnings.catch_warnings` around each photo would swap the whole process's filters under the other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Photo:
    """A photo: its file's `stem` (the key of predictions), its `path` where known, and its reference captions."""

    stem: str
    path: Path | None
    captions: tuple[str, ...] = ()
    id: str = field(default="", compare=False)
    """What the annotations call it besides."""
    content: bytes | None = field(default=None, compare=False, repr=False)
    """Its file, where that lies inside another, as in the shards of a corpus."""


def is_photo(path: Path) -> bool:
    """Whether a file is a photo by the ending of its name or else by its content."""
    if path.suffix.lower() in PHOTO_SUFFIXES:
        return path.is_file()
    with suppress(Exception), Image.open(path, formats=("JPEG", "PNG", "WEBP")):  # raw photos begin like TIFF
        return True
    return False


def first_of(names: Sequence[str | Path], shown: int = 5) -> str:
    """`3 photos (a, b, c)`; of many photos only the first are named, of long names only the end.

    >>> first_of(["a", "b", "c"], shown=2)
    '3 photos (a, b and 1 more)'
    """
    listed = ", ".join(one_line(str(name)[-120:]) for name in names[:shown])
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} photo{'s' * (len(names) > 1)} ({listed}{rest})"


class BadPhoto(UserError):
    """A photo that cannot be read: `path`, and `reason` in a few words."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True, eq=False)
class LoadedPhoto:
    """A photo whose file has been read."""

    photo: Photo
    image: Image.Image | None
    """Its pixels, upright in RGB; None where the caller has its features and needs no pixels."""
    key: str
    """Hash of the file's bytes."""

    @property
    def stem(self) -> str:
        return self.photo.stem


def load_photo(photo: Photo, known: Callable[[str], bool] | None = None) -> LoadedPhoto:
    """Read the file of `photo` once: hash its bytes, and decode them to the last one unless the hash is `known`.

    The image is upright RGB (8 bits a channel): EXIF rotation is applied, transparency is laid on white, 16-bit and
    wider grey is scaled to 8 bits, and of an animation the first frame is taken. A photo of more than `PIXELS` is
    shrunk by a whole number. Raises BadPhoto for what cannot be decoded, has more than 220,000,000 pixels, or is a
    strip more than `LONGEST` times as long as wide.
    """
    path, content = photo.path or Path(photo.stem), photo.content
    if photo.path is None and content is None:
        raise BadPhoto(path, "its file is not known; name the folder of the photos")
    try:
        content = path.read_bytes() if content is None else content
        key = hashlib.blake2b(content, digest_size=16).hexdigest()
        return LoadedPhoto(photo, None if known and known(key) else _decode(content), key)
    except UnidentifiedImageError:
        hint = "; HEIC photos need pip install pillow-heif" * (content[4:8] == b"ftyp")
        raise BadPhoto(path, f"not a photo in a known format{hint}" if content else "empty file") from None
    except Exception as error:  # PIL refuses huge photos; decoders of damaged files raise almost anything
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise BadPhoto(path, f"cannot be read ({reason})") from None


def key_of(photo: Photo) -> str | None:
    """Hash of the file of `photo`, as `LoadedPhoto` has it; None where it cannot be read."""
    with suppress(BadPhoto):
        return load_photo(photo, known=bool).key


def _decode(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        short, long = sorted(image.size)
        if long > LONGEST * short:
            raise ValueError(f"{image.width} x {image.height} pixels: more than {LONGEST} times as long as wide")
        shrink = min(math.ceil(math.sqrt(short * long / PIXELS)), max(1, short // SHORT_EDGE))
        image.draft(None, (image.width // shrink, image.height // shrink))  # a JPEG's decoder shrinks as it decodes
        image.load()
        shrink = max(1, round(shrink * max(image.size) / long))  # what is left to do
        with suppress(Exception):  # EXIF that cannot be parsed says nothing of the rotation; the pixels are sound
            ImageOps.exif_transpose(image, in_place=True)  # else it is copied, rotated or not
        if image.mode == "F" or image.mode.startswith("I"):
            image = _grey8(image)
        elif image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB").reduce(shrink)


def _grey8(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as mode L. PIL's own conversion clips: a 16-bit photo would turn white."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = 0.0, 65535.0 if grey.max() > 4095 else 4095.0  # cameras keep 12 bits in 16
    if image.mode == "F" or grey.min() < low or grey.max() > high:  # no agreed range: stretch from darkest to brightest
        low, high = float(grey.min()), float(grey.max())
    return Image.fromarray(np.round((grey - low) / ((high - low) or 1) * 255).astype(np.uint8))


@dataclass
class PhotoBatches:
    """Photos in lists of `batch_size`, read and decoded ahead by `workers` threads, in order, behind a progress bar.

    A photo that cannot be decoded is named on stderr and kept in `bad`; the next one takes its place, so that only the
    last list may be shorter.
    """

    photos: Sequence[Photo]
    batch_size: int
    workers: int = 2
    label: str = "photos"
    done: int = 0
    """Photos that an earlier run finished."""
    known: Callable[[str], bool] | None = None
    """A photo whose hash is known is not decoded."""
    bad: list[BadPhoto] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[list[LoadedPhoto]]:
        with tqdm(total=self.done + len(self.photos), initial=self.done, desc=self.label, unit="photo") as bar:
            good = self._good(bar)
            while batch := list(islice(good, self.batch_size)):
                yield batch
                bar.update(len(batch))

    def _good(self, bar: tqdm) -> Iterator[LoadedPhoto]:
        def load(photo: Photo) -> LoadedPhoto | BadPhoto:
            try:
                return load_photo(photo, self.known)
            except BadPhoto as bad:
                return bad

        # at most 2 * workers photos are in memory besides the batch in use
        for loaded in prefetch(self.photos, load, self.workers, 2 * self.workers):
            if isinstance(loaded, LoadedPhoto):
                yield loaded
                continue
            self.bad.append(loaded)
            bar.update()
            say(f"skipped {loaded}")
