"""Heatmaps of captions: a PNG for each photo, with a tile for each word, and one HTML page of all photos."""

import textwrap
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from common.files import written_whole
from models.attribution import METHODS, Unit
from models.encoder import PatchGrid
from pages.page import data_uri, write_page

COLOURS = "viridis"  # its lightness grows evenly, and colour-blind readers can tell its colours apart
OPACITY = 0.75
EDGE = 480  # px, the longer edge of a photo in the PNG and on the page


@dataclass
class Drawn:
    """All that is shown of one photo."""

    stem: str
    image: Image.Image
    caption: str
    units: list[Unit]
    grid: PatchGrid
    maps: dict[str, np.ndarray]
    """(W, P) by method."""
    note: str = ""
    """The score by which the photo was chosen, if it was chosen by one."""
    objects: dict[str, tuple[tuple[int, ...], np.ndarray]] = field(default_factory=dict)
    """{name: (indices of its words, (H, W) mask)} of the objects that the caption names."""


def shown(maps: np.ndarray) -> np.ndarray:
    """(W, P) -> values from 0 to 1, on one scale for all words of the caption; negative values become 0.

    The highest hundredth of the values becomes 1: if only the maximum did, one patch could make all others dark.
    """
    highest = float(np.percentile(np.maximum(maps, 0), 99))
    return np.clip(maps / max(highest, 1e-12), 0, 1)


def _small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
    return image


# ------------------------------------------------------------------------------------------- the PNG


def draw_words(photo: Drawn, method: str, file: Path) -> None:
    """PNG: the photo, then a tile for each word with its probability p, on one colour scale."""
    from matplotlib import font_manager, rcParams
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rcParams["font.family"] = ["DejaVu Sans", *(name for name in font_manager.get_font_names() if "CJK" in name)]
    words = [i for i, unit in enumerate(photo.units) if any(map(str.isalnum, unit.text))]
    words = words or list(range(len(photo.units)))  # a full stop has a map too, but it would only set the scale
    columns = min(6, 1 + len(words))
    rows = -(-(1 + len(words)) // columns)
    width, height = photo.image.size
    tile_height = 2.0 * min(max(height / width, 0.5), 2.0)
    figure = Figure(figsize=(2.0 * columns + 1.0, (tile_height + 0.35) * rows + 0.8), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in tiles:
        axes.axis("off")
    background = _greyed(photo)
    tiles[0].imshow(background)
    tiles[0].set_title(photo.stem[:24], fontsize=8, parse_math=False)
    left, top, right, bottom = photo.grid.box
    for axes, i, values in zip(tiles[1:], words, shown(photo.maps[method][words])):
        axes.imshow(background, extent=(0, width, height, 0))
        patches = values.reshape(photo.grid.rows, photo.grid.columns)
        opacity = OPACITY * np.minimum(1, patches + 0.15)  # low values hide little of the photo
        box = {"extent": (left, right, bottom, top), "interpolation": "bilinear"}
        axes.imshow(patches, COLOURS, vmin=0, vmax=1, alpha=opacity, **box)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_title(f"{photo.units[i].text}  p {photo.units[i].probability:.2f}", fontsize=9, parse_math=False)
    # not wrapped by matplotlib, which reads what stands between dollar signs as mathematics when it wraps
    title = textwrap.fill(photo.caption, round(13 * figure.get_figwidth()))
    figure.suptitle(f"{title}\n{photo.note}".strip(), fontsize=10, parse_math=False)
    bar = figure.colorbar(ScalarMappable(cmap=COLOURS), ax=list(tiles), alpha=OPACITY, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label(f"{method}; 1 is the highest 1% of this caption", fontsize=8)
    with written_whole(file) as part:
        figure.savefig(part, dpi=110, format="png")


def _greyed(photo: Drawn) -> Image.Image:
    """The small photo, pale grey where the encoder does not see it."""
    small = _small(photo.image)
    seen = [round(edge * small.width / photo.image.width) for edge in photo.grid.box]
    greyed = small.convert("L").point(lambda value: 0.4 * value + 89).convert("RGB")
    greyed.paste(small.crop(seen), seen)
    return greyed


# ------------------------------------------------------------------------------------------- the page


def write_heatmap_page(entries: list[dict[str, Any]], method: str, title: str, file: Path) -> None:
    """One self-contained page of all photos, each from `page_entry`; `method` is the one that it shows first."""
    from matplotlib import colormaps

    colours = (255 * colormaps[COLOURS](np.linspace(0, 1, 256))[:, :3]).round().astype(int).tolist()
    methods = {name: (METHODS[name].kind, METHODS[name].about) for name in entries[0]["maps"]}
    write_page(file, "heatmaps", title, {"method": method, "methods": methods, "colours": colours, "photos": entries})


def page_entry(photo: Drawn) -> dict[str, Any]:
    """What the page holds of a photo, all of it small: `maps` as bytes, `size` and `box` in the photo's own pixels."""
    small = _small(photo.image)
    shares = [(100 * unit.shares).round().astype(int).tolist() for unit in photo.units]
    maps = {name: (255 * shown(values)).round().astype(np.uint8) for name, values in photo.maps.items()}
    return {
        "stem": photo.stem,
        "note": photo.note,
        "caption": photo.caption,
        "photo": data_uri(small, quality=80),
        "size": photo.image.size,
        "box": photo.grid.box,
        "grid": [photo.grid.rows, photo.grid.columns],
        "words": [
            {"text": unit.text, "probability": round(unit.probability, 4), "shares": in_percent}
            for unit, in_percent in zip(photo.units, shares)
        ],
        "maps": {name: b64encode(values).decode() for name, values in maps.items()},
        "objects": [
            {"name": name, "words": words, "outline": _outline(mask, small.size)}
            for name, (words, mask) in photo.objects.items()
        ],
    }


def _outline(mask: np.ndarray, size: tuple[int, int]) -> str:
    """(H, W) mask -> its outline, a white line with black edges, as a transparent picture of `size`."""
    small = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    inside = small.point(lambda value: 255 * (value > 127))
    picture = Image.new("RGBA", size)
    for colour, pixels in (("black", 7), ("white", 5), ("black", 3), ("#0000", 1)):  # from the outer edge inwards
        picture.paste(colour, mask=inside.filter(ImageFilter.MaxFilter(pixels)))
    return data_uri(picture.quantize(4), "PNG", optimize=True)
