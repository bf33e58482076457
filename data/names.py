"""Names that mean the same photo, though programs write them with other folders, endings, letters or zeros."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

PHOTO_SUFFIXES = {*".jpg .jpeg .jpe .jfif .png .webp .avif .heic .heif .bmp .gif .tif .tiff".split()}
PHOTO_SUFFIXES |= {*".ppm .pgm .pbm .pnm .jp2".split()}


def plain_name(name: object) -> str:
    """A photo's name without folders, ending, case, and COCO's prefix and zeros; letters composed as in Unicode's NFC.

    >>> plain_name(r"val2014\\COCO_val2014_000000391895.JPG"), plain_name(391895), plain_name("Dog.v2.png")
    ('391895', '391895', 'dog.v2')
    """
    path = PurePosixPath(unicodedata.normalize("NFC", str(name)).replace("\\", "/"))
    plain = (path.stem if path.suffix.lower() in PHOTO_SUFFIXES else path.name).casefold()
    return re.sub(r"^(coco_\w+?_)?0*(?=\d+$)", "", plain)


def finder(names: Iterable[Sequence[str]]) -> Callable[[str], str | None]:
    """`find(name)`: the photo that `name` means, as it stands or by `plain_name`; None where none or several could be.

    `names` has for each photo its name and then other names of it, such as its id.

    >>> find = finder([("000000000007.jpg", "7"), ("a.jpg",), ("a.png",)])
    >>> find("7"), find("a.png"), find("a")
    ('000000000007.jpg', 'a.png', None)
    """
    meant = defaultdict(set)
    for own in names:
        meant[own[0]] = {own[0]}
        for name in filter(None, own):
            meant["alike", plain_name(name)].add(own[0])

    def find(name: str) -> str | None:
        candidates = meant.get(name) or meant.get(("alike", plain_name(name)), ())
        return next(iter(candidates)) if len(candidates) == 1 else None

    return find
