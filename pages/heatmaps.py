"""Pictures of what words looked at: a PNG grid a photo, a sheet of methods and words, and one page of all photos."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from common.files import written_whole
from models.attribution import ABOUT, Unit
from models.encoder import PatchGrid
from pages.page import data_uri, read_page, write_page

COLOURS = "viridis"  # even in lightness, and told apart by colour-blind eyes
OPACITY = 0.75
EDGE = 480  # px, the longer edge of a photo on the page


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
    """Its score, where it was chosen by one."""
    objects: dict[str, tuple[tuple[int, ...], np.ndarray]] = field(default_factory=dict)
    """{name: (places of its words, (H, W) mask)} of what the caption names."""


def shown(maps: np.ndarray) -> np.ndarray:
    """(W, P) -> values from 0 to 1 on one scale for the whole caption; what is below zero is not shown.

    One is reached by the caption's highest hundredth: a single patch would leave the others dark.
    """
    positive = np.maximum(maps, 0)
    return np.clip(positive / max(float(np.percentile(positive, 99)), 1e-12), 0, 1)


def _tile(axes, photo: Drawn, values: np.ndarray | None) -> None:
    """One picture: the photo, greyed where the encoder never looked, with (P) values over the rest."""
    from matplotlib import colormaps

    left, top, right, bottom = photo.grid.box
    width, height = photo.image.size
    picture = np.asarray(photo.image, dtype=float) / 255
    y, x = np.mgrid[0:height, 0:width] + 0.5
    outside = (x < left) | (x > right) | (y < top) | (y > bottom)
    picture[outside] = 0.4 * picture[outside].mean(axis=1, keepdims=True) + 0.35
    if values is not None:
        box = round(left), round(top), round(right), round(bottom)
        grid = Image.fromarray(values.reshape(photo.grid.rows, photo.grid.columns).astype(np.float32))
        smooth = Image.new("F", photo.image.size)
        smooth.paste(grid.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BILINEAR), box)
        level = np.asarray(smooth)[..., None]
        over = np.where(outside[..., None], 0, OPACITY * np.minimum(1, level + 0.15))  # what is low hides little
        picture = (1 - over) * picture + over * colormaps[COLOURS](level[..., 0])[..., :3]
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[])


def draw_words(photo: Drawn, method: str, file: Path) -> None:
    """PNG: the photo, then a tile for each word, on one colour scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    count = 1 + len(photo.units)
    columns = min(6, count)
    rows = -(-count // columns)
    width, height = photo.image.size
    tall = 2.0 * min(max(height / width, 0.5), 2.0)
    figure = Figure(figsize=(2.0 * columns + 1.0, (tall + 0.35) * rows + 0.8), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    values = shown(photo.maps[method])
    _tile(tiles[0], photo, None)
    tiles[0].set_title(photo.stem[:24], fontsize=8, parse_math=False)
    for axes, unit, one in zip(tiles[1:], photo.units, values):
        _tile(axes, photo, one)
        axes.set_title(f"{unit.text or '(end)'}  p {unit.probability:.2f}", fontsize=9, parse_math=False)
    for axes in tiles[count:]:
        axes.axis("off")
    title = photo.caption + (f"\n{photo.note}" if photo.note else "")
    figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    bar = figure.colorbar(ScalarMappable(cmap=COLOURS), ax=list(tiles), shrink=0.6, aspect=30, pad=0.01)
    bar.set_label(f"{method}; 1: the caption's highest hundredth", fontsize=8)
    with written_whole(file) as part:
        figure.savefig(part, dpi=110, format="png")


def draw_methods(photo: Drawn, file: Path) -> None:
    """PNG sheet: a row for each method, a column for each word, each method on a scale of its own."""
    from matplotlib.figure import Figure

    rows, columns = len(photo.maps), len(photo.units)
    width, height = photo.image.size
    tall = 1.25 * min(max(height / width, 0.5), 2.0)
    figure = Figure(figsize=(1.25 * columns + 1.0, tall * rows + 0.8), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False)
    for line, (method, maps) in zip(tiles, photo.maps.items()):
        for axes, values in zip(line, shown(maps)):
            _tile(axes, photo, values)
        line[0].set_ylabel(method, fontsize=9)
    for axes, unit in zip(tiles[0], photo.units):
        axes.set_title(unit.text or "(end)", fontsize=9, parse_math=False)
    figure.suptitle(photo.caption, fontsize=10, wrap=True, parse_math=False)
    with written_whole(file) as part:
        figure.savefig(part, dpi=90, format="png")


def _outline(mask: np.ndarray) -> str:
    """(H, W) mask -> a transparent picture of its outline, white in black, that lies on the photo."""
    small = Image.fromarray(mask.astype(np.uint8) * 255)
    wide, narrow = small.filter(ImageFilter.MaxFilter(7)), small.filter(ImageFilter.MaxFilter(5))
    thin = small.filter(ImageFilter.MaxFilter(3))
    picture = Image.new("RGBA", small.size)
    picture.paste((0, 0, 0, 255), mask=ImageChops.subtract(wide, small))
    picture.paste((255, 255, 255, 255), mask=ImageChops.subtract(narrow, thin))
    return data_uri(picture.quantize(4), "PNG", optimize=True)


def reduced(photo: Drawn) -> Drawn:
    """The photo no longer than EDGE, its masks and its grid with it: all that pictures and page need."""
    image = photo.image.copy()
    image.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
    across, down = image.width / photo.image.width, image.height / photo.image.height
    left, top, right, bottom = photo.grid.box
    grid = PatchGrid(photo.grid.rows, photo.grid.columns, (left * across, top * down, right * across, bottom * down))
    objects = {}
    for name, (words, mask) in photo.objects.items():
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BILINEAR)
        objects[name] = words, np.asarray(small) > 127
    maps = {name: maps.astype(np.float32) for name, maps in photo.maps.items()}
    return replace(photo, image=image, grid=grid, maps=maps, objects=objects)


def _for_page(photo: Drawn) -> dict:
    width, height = photo.image.size
    left, top, right, bottom = photo.grid.box
    return {
        "stem": photo.stem,
        "note": photo.note,
        "caption": photo.caption,
        "photo": data_uri(photo.image, quality=80),
        "size": photo.image.size,
        "box": [
            round(value, 4)
            for value in (
                100 * left / width,
                100 * top / height,
                100 * (right - left) / width,
                100 * (bottom - top) / height,
            )
        ],
        "grid": [photo.grid.rows, photo.grid.columns],
        "words": [
            {"text": unit.text or "(end)", "probability": round(unit.probability, 4), "mass": round(unit.image_mass, 4)}
            for unit in photo.units
        ],
        "maps": {
            method: base64.b64encode((255 * shown(maps)).round().astype(np.uint8).tobytes()).decode()
            for method, maps in photo.maps.items()
        },
        "objects": [
            {"name": name, "words": words, "outline": _outline(mask)} for name, (words, mask) in photo.objects.items()
        ],
    }


def write_heatmap_page(photos: Sequence[Drawn], method: str, title: str, file: Path) -> None:
    """One self-contained page of all photos; `method` is the one shown first."""
    from matplotlib import colormaps

    colours = (255 * colormaps[COLOURS](np.linspace(0, 1, 256))[:, :3]).round().astype(int).tolist()
    about = {name: ABOUT[name] for name in photos[0].maps}
    data = {"method": method, "about": about, "colours": colours, "photos": [_for_page(photo) for photo in photos]}
    write_page(file, "heatmaps", title, data)


def join_pages(pages: dict[str, Path], title: str, file: Path) -> None:
    """Write the photos of several pages {whose: file} as one, each with a word on whose it is."""
    data: dict = {}
    for whose, page in pages.items():
        own = read_page(page)
        for photo in own["photos"]:
            photo["note"] = f"{whose}; {photo['note']}" if photo["note"] else whose
        data = own if not data else data | {"photos": data["photos"] + own["photos"]}
    write_page(file, "heatmaps", title, data)
