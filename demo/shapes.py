"""Draw scenes of coloured shapes with captions and masks: a small captioning set that needs no download.

    python -m demo.shapes --output runs/demo/shapes
    python -m demo.shapes --output runs/demo/shapes_small --train 300 --val 50

Writes ROOT/{train,val}.json (COCO captions, five a scene), ROOT/instances_{train,val}.json (COCO instances, a category
such as "red circle" each, masks as run lengths) and ROOT/images/{train,val}/*.png. The same seed draws the same scenes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.config import UserError, check, run
from common.files import folder_written_whole, write_json
from data.instances import read_instances

SIZE = 192  # px, a whole multiple of the 64 px that the small CLIP sees
CELL = 24  # px; things stand on the middles of cells, patches of that CLIP, so that a small model learns shapes fast
REACHES = (25, 31)  # px from the middle of a thing to its corners
SUPERSAMPLE, CAPTIONS = 4, 5
CLEAR = 1.3  # a direction is named only where its offset is this much longer than the other one

COLOURS = {
    "red": (214, 40, 40), "orange": (247, 127, 0), "yellow": (250, 210, 30), "green": (46, 160, 67),
    "blue": (40, 95, 225), "purple": (130, 50, 170), "pink": (250, 140, 195),
}  # fmt: skip
GROUNDS = {"white": (243, 243, 240), "gray": (150, 150, 153), "black": (28, 28, 32), "brown": (92, 64, 48)}
TEXTURES = ("plain", "gradient", "stripes", "mottled")


def _outlines() -> dict[str, np.ndarray]:
    """Corners (N, 2) of every shape about the middle of its box, y downwards, about one unit from middle to corner."""

    def ring(corners: int, start: float = -0.5) -> np.ndarray:
        angles = np.pi * (start + 2 * np.arange(corners) / corners)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    star = ring(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    half = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]
    cross = np.array(half + [(-x, -y) for x, y in half])
    corners = {"circle": 0.9 * ring(64), "square": 1.1 * ring(4, start=-0.25), "triangle": 1.1 * ring(3)}
    corners |= {"star": 1.1 * star, "cross": 0.95 * cross, "diamond": 1.05 * ring(4) * (0.66, 1.0)}
    return {shape: xy - (xy.min(axis=0) + xy.max(axis=0)) / 2 for shape, xy in corners.items()}


OUTLINES = _outlines()
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in OUTLINES]
CATEGORIES = {name: number for number, name in enumerate(NAMES, 1)}


@dataclass(frozen=True)
class Config:
    output: Path
    """Folder to write; one already drawn with the same settings is left as it is."""
    train: PositiveInt = 3000
    """Scenes in the training split."""
    val: PositiveInt = 300
    """Scenes in the validation split."""
    seed: NonNegativeInt = 0
    """The same seed draws the same scenes, byte for byte."""
    overwrite: bool = False
    """Draw anew where the folder was drawn before."""


class Thing(NamedTuple):
    """One shape of a scene: its middle and reach in pixels, its turn in radians."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def a(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


class Scene(NamedTuple):
    """A background and the shapes on it."""

    ground: str
    texture: str
    things: tuple[Thing, ...]


# ------------------------------------------------------------------------------------------- scenes


def make_scene(rng: np.random.Generator) -> Scene:
    """One to three different shapes, mostly two, apart from one another; two of them lie in a clear direction."""
    count = int(rng.choice([1, 2, 3], p=[0.15, 0.65, 0.2]))
    names = [NAMES[i].split() for i in rng.choice(len(CATEGORIES), count, replace=False)]
    while True:
        radii = rng.choice(REACHES, count) * rng.uniform(0.97, 1.03, count)
        xy = CELL * (rng.integers(1, SIZE // CELL - 1, (count, 2)) + 0.5)
        turns = rng.uniform(-0.05, 0.05, count)
        parts = zip(names, xy.tolist(), radii.tolist(), turns.tolist())
        things = tuple(Thing(*name, *middle, radius, turn) for name, middle, radius, turn in parts)
        pairs = permutations(things, 2)
        apart = all(np.hypot(one.x - two.x, one.y - two.y) > 1.15 * (one.radius + two.radius) for one, two in pairs)
        if apart and (count == 1 or clear_pairs(things)):
            return Scene(str(rng.choice(list(GROUNDS))), str(rng.choice(TEXTURES)), things)


def direction(one: Thing, two: Thing) -> str | None:
    """Where `one` lies as seen from `two`: left, right, above or below; None between two directions."""
    dx, dy = one.x - two.x, one.y - two.y
    if abs(dx) > CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def clear_pairs(things: tuple[Thing, ...]) -> list[tuple[Thing, Thing]]:
    """Pairs, in both orders, of which a caption may name the direction."""
    return [pair for pair in permutations(things, 2) if direction(*pair)]


def _backdrop(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The background: one colour, its brightness gently uneven."""
    y, x = np.mgrid[0 : 1 : SIZE * 1j, 0 : 1 : SIZE * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    light = np.zeros((SIZE, SIZE))
    if scene.texture == "gradient":
        light = 24 * (along - along.mean())
    elif scene.texture == "stripes":
        light = 7 * np.sin(2 * np.pi * rng.uniform(5, 11) * along)
    elif scene.texture == "mottled":
        noise = Image.fromarray(rng.normal(0, 8, (12, 12)).astype(np.float32))
        light = np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    colours = np.array(GROUNDS[scene.ground]) + light[..., None]
    return Image.fromarray(np.clip(colours.round(), 0, 255).astype(np.uint8))


def draw_scene(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[np.ndarray]]:
    """The picture, SIZE x SIZE in RGB, and every thing's mask (SIZE, SIZE): True where it covers half the pixel."""
    picture, masks = _backdrop(scene, rng), []
    for thing in scene.things:
        turn = np.array([[np.cos(thing.turn), np.sin(thing.turn)], [-np.sin(thing.turn), np.cos(thing.turn)]])
        corners = thing.radius * OUTLINES[thing.shape] @ turn + (thing.x, thing.y)
        fine = Image.new("L", (SUPERSAMPLE * SIZE, SUPERSAMPLE * SIZE))
        ImageDraw.Draw(fine).polygon([tuple(corner) for corner in SUPERSAMPLE * corners], fill=255)
        cover = fine.reduce(SUPERSAMPLE)
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-10, 11, 3), 0, 255)
        picture.paste(tuple(colour.tolist()), (0, 0), cover)
        masks.append(np.asarray(cover) >= 128)
    return picture, masks


# ------------------------------------------------------------------------------------------- captions

WORDS = {
    "left": ("to the left of", "left of"), "right": ("to the right of", "right of"),
    "above": ("above", "over"), "below": ("below", "under"),
}  # fmt: skip
PLACES = (
    "in the upper left", "at the top", "in the upper right", "on the left", "in the middle", "on the right",
    "in the lower left", "at the bottom", "in the lower right",
)  # fmt: skip
TEMPLATES = {
    1: (
        "{a}", "{a} on a {ground} background", "{a} {place} of the picture", "there is {a} {place}",
        "a {ground} background with {a} {place}", "a single {name} on {ground}", "a picture of {a}",
    ),
    2: (
        "{a} {where} {b}", "{a} {where} {b} on a {ground} background", "the {name} is {where} the {other}",
        "there is {a} {where} {b}", "{a} and {b} on a {ground} background",
        "a {ground} background with {a} {where} {b}", "{a} lies {where} {b}", "two shapes, {a} and {b}",
    ),
    3: (
        "{a}, {b} and {c}", "{a}, {b} and {c} on a {ground} background", "{a} {where} {b}, and also {c}",
        "there is {a} {where} {b}, and {c}", "a {ground} background with {c}, and {a} {where} {b}",
        "three shapes, {c}, {a} and {b}", "{c}, and {a} {where} {b}", "the {name} is {where} the {other}",
    ),
}  # fmt: skip


def write_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five different captions, all true: every named pair is in the scene, every direction holds between middles."""
    chosen = rng.choice(TEMPLATES[len(scene.things)], CAPTIONS, replace=False)
    return [_fill(str(template), scene, rng) for template in chosen]


def _fill(template: str, scene: Scene, rng: np.random.Generator) -> str:
    one, *others = scene.things
    words = {"ground": scene.ground, "place": PLACES[3 * int(3 * one.y / SIZE) + int(3 * one.x / SIZE)]}
    if others:
        pairs = clear_pairs(scene.things)
        one, two = pairs[rng.integers(len(pairs))]
        third = next((thing.a for thing in scene.things if thing not in (one, two)), "")
        words |= {"where": WORDS[direction(one, two)][rng.integers(2)], "b": two.a, "c": third, "other": two.name}
    return template.format(**words, a=one.a, name=one.name)


PAIR = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(OUTLINES)})(?:e?s)?\b", re.IGNORECASE)


def named_pairs(caption: str) -> list[tuple[str, str]]:
    """Colour and shape of everything that a caption names, in its order.

    >>> named_pairs("A red circle left of a blue square on a white background")
    [('red', 'circle'), ('blue', 'square')]
    """
    return [(colour.lower(), shape.lower()) for colour, shape in PAIR.findall(caption)]


def pair_scores(predictions: dict[str, str], instances: Path) -> dict[str, float]:
    """How well captions {image stem: caption} name what the scenes of an instances file hold; fractions from 0 to 1.

    `pairs_right` is the share of named colour-and-shape pairs that are in their scene (0 where none is named);
    `pairs_found` is the share of the captioned scenes' things that are named. A pair counts once a caption.
    Raises UserError where there is no caption, or one for a scene that the file does not hold.
    """
    objects = read_instances(instances).objects
    scenes = {stem: {tuple(name.split()) for name in names} for stem, names in objects.items()}
    check([f"predictions: no scene {stem!r} in {instances}" for stem in predictions if stem not in scenes])
    check([] if predictions else ["predictions: expected at least one caption, got none"])
    named = {stem: set(named_pairs(caption)) for stem, caption in predictions.items()}
    right = sum(len(named[stem] & scenes[stem]) for stem in named)
    claims, things = (sum(len(pairs[stem]) for stem in named) for pairs in (named, scenes))
    return {"pairs_right": right / max(1, claims), "pairs_found": right / max(1, things)}


# ------------------------------------------------------------------------------------------- files


RECORD = "made_by.json"  # in each folder: the settings that it was made with


def make_folder(folder: Path, settings: dict[str, Any], overwrite: bool, fill: Callable[[Path], None]) -> bool:
    """Have `fill` write `folder` as a whole; False where it is there already, made with the same settings.

    With `overwrite` it is made anew. Raises UserError where it was made with other settings, or not by this function.
    """
    if folder.exists() and not (folder / RECORD).is_file():
        raise UserError(f"output: {folder} exists and was not made by this command; give another name")
    if folder.exists() and not overwrite:
        if json.loads((folder / RECORD).read_text(encoding="utf-8")) == settings:
            return False
        raise UserError(f"output: {folder} was made with other settings; give another name, or --overwrite")
    with folder_written_whole(folder) as part:
        fill(part)
        write_json(part / RECORD, settings)
    return True


def draw_split(root: Path, split: str, count: int, seed: int, first_id: int) -> None:
    """Draw `count` scenes into `root` as the split `train` or `val`, image ids from `first_id` on."""
    from pycocotools import mask as run_lengths

    (root / "images" / split).mkdir(parents=True)
    images, captions, instances = [], [], []
    for i in tqdm(range(count), desc=f"drawing {split}", unit="scene"):
        rng = np.random.default_rng([seed, first_id + i])
        scene = make_scene(rng)
        picture, masks = draw_scene(scene, rng)
        image_id, file_name = first_id + i, f"{split}_{i:05d}.png"
        picture.save(root / "images" / split / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE})
        for caption in write_captions(scene, rng):
            captions.append({"id": CAPTIONS * first_id + len(captions), "image_id": image_id, "caption": caption})
        for thing, mask in zip(scene.things, masks):
            lengths = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = {"size": [SIZE, SIZE], "counts": lengths["counts"].decode("ascii")}
            one = {"id": 3 * first_id + len(instances), "image_id": image_id, "category_id": CATEGORIES[thing.name]}
            one |= {"bbox": run_lengths.toBbox(lengths).tolist(), "area": int(mask.sum())}
            instances.append(one | {"segmentation": segmentation, "iscrowd": 0})
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    write_json(root / f"{split}.json", {"images": images, "annotations": captions}, indent=None)
    everything = {"images": images, "annotations": instances, "categories": categories}
    write_json(root / f"instances_{split}.json", everything, indent=None)


def main(cfg: Config) -> None:
    def draw(root: Path) -> None:
        draw_split(root, "train", cfg.train, cfg.seed, first_id=1)
        draw_split(root, "val", cfg.val, cfg.seed, first_id=cfg.train + 1)

    settings = {"train": cfg.train, "val": cfg.val, "seed": cfg.seed}
    made = make_folder(cfg.output, settings, cfg.overwrite, draw)
    print(f"{cfg.output}: {cfg.train} + {cfg.val} scenes" + ("" if made else ", already drawn with these settings"))


if __name__ == "__main__":
    run(main, Config)
