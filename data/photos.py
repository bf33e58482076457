"""Photos as upright RGB images: every mode and rotation that PIL can read, and one clear reason where it cannot."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from data.prefetch import prefetch

PHOTO_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2".split())

# Named, since otherwise PIL also runs Ghostscript on PostScript, and registers formats late, a race between threads.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

MAX_PIXELS = 178_956_970
"""Photos with more pixels are refused before decoding; the size at which PIL, too, speaks of a decompression bomb."""

# Damaged EXIF and large photos make PIL warn though the photo reads well. A filter that stands, since
# `warnings.catch_warnings` around each photo would swap the whole process's filters under the other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Photo:
    """A photo: its file's `stem` (the key of predictions), its `path` where known, and its reference captions."""

    stem: str
    path: Path | None
    captions: tuple[str, ...] = ()


class BadPhoto(Exception):
    """A photo that cannot be read: `path`, and `reason` in a few words."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def open_photo(path: Path) -> Image.Image:
    """The photo at `path`, decoded to its last byte, as an upright RGB image (8 bits a channel).

    EXIF rotation is applied, transparency is laid on white, 16-bit and wider grey is scaled to 8 bits, and of an
    animation the first frame is taken. Raises BadPhoto for what cannot be decoded or has more than MAX_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _rgb(_upright(image))
    except UnidentifiedImageError:
        raise BadPhoto(path, "not a photo in a known format" if path.stat().st_size else "empty file") from None
    except FileNotFoundError:
        raise BadPhoto(path, "no such file") from None
    except Image.DecompressionBombError:
        raise BadPhoto(path, f"too large, more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders of damaged files raise almost anything: SyntaxError, struct.error, ...
        raise BadPhoto(path, f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be parsed says nothing of the rotation; the pixels are sound
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey8(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as mode L. PIL's own conversion clips: a 16-bit photo would turn white."""
    import numpy

    grey = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float32))
    low, high = 0.0, 65535.0
    if image.mode == "F" or grey.min() < low or grey.max() > high:  # no agreed range: stretch from darkest to brightest
        low, high = float(grey.min()), float(grey.max())
    return Image.fromarray(numpy.round((grey - low) / ((high - low) or 1) * 255).astype(numpy.uint8))


def load_photos(photos: Iterable[Photo], workers: int = 2) -> Iterator[tuple[Photo, Image.Image | BadPhoto]]:
    """Yield (photo, its RGB image or the BadPhoto that says why not) in order, decoding ahead in `workers` threads.

    At most 2 * workers photos are in memory besides the one in use; with 0 workers each is decoded when asked for.
    """
    yield from prefetch(photos, lambda photo: (photo, _image_or_reason(photo)), workers, 2 * workers)


def _image_or_reason(photo: Photo) -> Image.Image | BadPhoto:
    if photo.path is None:
        return BadPhoto(Path(photo.stem), "its file is not known; name the folder of the photos")
    try:
        return open_photo(photo.path)
    except BadPhoto as bad:
        return bad
