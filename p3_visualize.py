"""P3: which patches of a photo each word of its caption looked at, and a number that says if they are the right ones.

    python p3_visualize.py --checkpoint checkpoints/flickr8k --images MY_PHOTOS --output heatmaps
    python p3_visualize.py --model llava-hf/llava-1.5-7b-hf --images MY_PHOTOS --output heatmaps --quantize 4bit
    python p3_visualize.py --checkpoint RUN --images PHOTOS --output heatmaps --scores scores.json --top 1 --bottom 1
    python p3_visualize.py --checkpoint RUN --images PHOTOS --output heatmaps --instances instances_val.json

The output folder gets a PNG a photo (a tile a word) and index.html, a page of all photos to go over word by word. With
--instances, masks of what is in the photos, grounding.json and a table tell how well each method's maps lie on what
the words name, beside controls that show what is luck.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from tqdm import tqdm

from common.config import NothingDone, UserError, check, run
from common.device import Precision, pick_device, seed_everything, torch_dtype
from common.files import check_output, write_json
from data.annotations import find_photos, read_annotations
from data.features import FeatureCache
from data.instances import Instances, read_instances
from data.photos import BadPhoto, Photo, load_photos
from metrics.grounding import GroundingTable, Named, cover_on_grid, find_named
from metrics.object_words import phrases
from models.attention import CaptionerEye, Eye, LlavaEye, Look
from models.attribution import METHODS, Unit, split_units
from models.checkpoint import find_checkpoint, load_captioner
from models.decoding import Decoding, check_decoding, photo_seed
from models.encoder import PatchGrid
from models.vlm import PROMPT, Quantize, check_model, check_quantize, load_llava
from pages.heatmaps import Drawn, draw_methods, draw_words, reduced, write_heatmap_page

DEFAULT = "rel"


@dataclass(frozen=True)
class Config:
    """Whose looks are drawn, of which photos, and how."""

    images: Path
    """Folder of photos, a photo, a text file with one path a line, or an annotation file."""
    output: Path
    """Folder to write."""
    overwrite: bool = False
    """Write into a folder that is there, over what it holds."""
    checkpoint: Path | None = None
    """A run folder of p2_train.py, or a checkpoint folder in it."""
    model: str | None = None
    """In place of a checkpoint: a LLaVA of transformers, hub id or local folder."""
    prompt: str = PROMPT
    """What a LLaVA is asked."""
    method: Literal[tuple(METHODS)] = DEFAULT
    """Method of the PNGs, and the one that the page shows first; the README says what each is, and what it scored."""
    unit: Literal["word", "token"] = "word"
    """word joins sub-words; token shows them apart, the closing end token included."""
    sheet: bool = False
    """Also write NAME.methods.png, all methods and words of a photo."""
    scores: Path | None = None
    """Scores of evaluate.py (the first run's, of several), by which the best and the worst photos are taken."""
    by: str = "clipscore"
    """The metric of `scores` that decides."""
    top: NonNegativeInt = 1
    """So many photos with the highest score, where there are `scores`."""
    bottom: NonNegativeInt = 1
    """So many photos with the lowest score, where there are `scores`."""
    annotations: Path | None = None
    """References of the photos: these are read in place of captions of the model's own; the first of each is drawn."""
    instances: Path | None = None
    """COCO instances with masks of the photos' objects: outlines on the page, and grounding scores."""
    decoding: Decoding = Decoding()
    """How a caption is chosen; greedy by default."""
    batch_size: PositiveInt = 8
    """Photos at a time."""
    workers: NonNegativeInt = 2
    """Threads that decode photos ahead."""
    precision: Precision = "float32"
    """float32 is exact; bf16 and fp16 are faster where the hardware multiplies them well."""
    features: Path = Path("runs/features")
    """Cache of encoded photos that training left; a captioner need not encode what is in it, nothing is added."""
    quantize: Quantize = "none"
    """Hold a LLaVA's weights in 8 or 4 bits, by bitsandbytes on a CUDA GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: NonNegativeInt = 0
    """Of sampling, of the controls, and of the intervals."""
    limit: PositiveInt | None = None
    """Only the first so many photos."""
    pictures: bool = True
    """False measures the grounding alone and draws nothing."""


def check_settings(cfg: Config) -> None:
    """Raise a UserError for what is wrong with the settings alone."""
    problems = check_decoding("decoding", cfg.decoding)
    if (cfg.checkpoint is None) == (cfg.model is None):
        problems.append("checkpoint: expected either checkpoint or model, got " + ("both" if cfg.model else "neither"))
    problems += check_model(cfg.model) if cfg.model else []
    if cfg.quantize != "none" and not cfg.model:
        problems.append(f"quantize: {cfg.quantize} is for a LLaVA; expected model with it")
    if cfg.instances and (cfg.quantize != "none" or cfg.unit == "token"):
        problems.append(
            "instances: grounding is of words, and its controls draw weights anew; expected unit word and "
            "quantize none with it"
        )
    if cfg.scores and cfg.top + cfg.bottom == 0:
        problems.append("scores: with top 0 and bottom 0 no photo is left; expected one of them higher")
    if cfg.output.resolve() == cfg.images.resolve():
        problems.append("output: expected another folder than that of the photos, which would be written over")
    if not cfg.pictures and not cfg.instances:
        problems.append("pictures: false leaves the grounding scores alone to be done; expected instances with it")
    if cfg.output.exists() and not cfg.output.is_dir():
        problems.append(f"output: {cfg.output} is a file; expected the name of a folder")
    elif cfg.output.exists() and any(cfg.output.iterdir()) and not cfg.overwrite:
        problems.append(f"output: {cfg.output} exists; give another name, or --overwrite to write into it")
    check(problems)


def choose(photos: list[Photo], cfg: Config) -> tuple[list[Photo], dict[str, str]]:
    """The photos to draw, and a note for each that was chosen by its score. Raises UserError."""
    if cfg.scores is None:
        return photos, {}
    try:
        scored = json.loads(cfg.scores.read_text(encoding="utf-8"))
        scored = scored.get("runs", [scored])[0]["photos"]
        found = {stem: float(one[cfg.by]) for stem, one in scored.items() if one[cfg.by] is not None}
    except OSError as error:
        raise UserError(f"scores: {cfg.scores}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise UserError(f"scores: {cfg.scores}: expected a file of evaluate.py's, {cfg.by} in it") from None
    by_stem = {photo.stem: photo for photo in photos}
    order = sorted((stem for stem in found if stem in by_stem), key=lambda stem: -found[stem])
    if not order:
        raise UserError(f"scores: {cfg.scores} scores none of the photos of {cfg.images}")
    best, worst = order[: cfg.top], order[max(len(order) - cfg.bottom, 0) :]
    notes = {stem: f"worst by {cfg.by}: {found[stem]:.3f}" for stem in worst}
    notes |= {stem: f"best by {cfg.by}: {found[stem]:.3f}" for stem in best}
    return [by_stem[stem] for stem in dict.fromkeys([*best, *worst])], notes


def open_eye(cfg: Config) -> Eye:
    """The model, made ready. Raises UserError."""
    device = pick_device(cfg.device)
    if cfg.model:
        check_quantize(cfg.quantize, device)
        return LlavaEye(load_llava(cfg.model, cfg.prompt, device, torch_dtype(cfg.precision), cfg.quantize))
    captioner = load_captioner(find_checkpoint(cfg.checkpoint)).merge()
    captioner.check_room(cfg.decoding.max_new_tokens, "decoding.max_new_tokens")
    captioner.place(device, torch_dtype(cfg.precision))
    return CaptionerEye(captioner, FeatureCache(captioner.encoder, cfg.features).see)


def named_objects(
    units: Sequence[Unit], masks: dict[str, np.ndarray], grid: PatchGrid
) -> tuple[list[Named], dict[str, tuple[tuple[int, ...], np.ndarray]]]:
    """What a caption names of what is in its photo and was seen: for the scores, and by name for the page."""
    places = find_named([unit.text for unit in units], {name: phrases(name) for name in masks})
    shape = (grid.rows, grid.columns)
    named = [Named(name, words, cover_on_grid(masks[name], grid.box, shape)) for name, words in places]
    named = [one for one in named if one.cover.max() > 0]
    return named, {one.name: (one.words, masks[one.name]) for one in named}


def masks_of(photo: Photo, image: Image.Image, instances: Instances) -> dict[str, np.ndarray]:
    """The photo's masks by category; none, said on stderr, where they are of another size."""
    height, width = instances.sizes.get(photo.stem, image.size[::-1])
    if (width, height) != image.size:
        tqdm.write(
            f"{photo.path} has {image.width} x {image.height} pixels, its masks {width} x {height}: not grounded; the "
            "photos are needed as they were annotated",
            file=sys.stderr,
        )
        return {}
    return instances.masks(photo.stem)


def captions_of(eye: Eye, photos: list[Photo], images: list[Image.Image], cfg: Config) -> list[list[list[int]]]:
    """Each photo's captions as token ids: its references, where they are to be read, or the model's own."""
    if cfg.annotations:
        return [[eye.ids(text) for text in photo.captions] for photo in photos]
    seeds = [photo_seed(cfg.seed, photo.stem) for photo in photos]
    return [[ids] for ids in eye.generate(photos, images, cfg.decoding, seeds)]


def decoded(photos: list[Photo], cfg: Config, label: str) -> Iterator[list[tuple[Photo, Image.Image]]]:
    """Batches of photos that can be decoded, behind a progress bar; the others are named. Raises NothingDone."""
    good = 0
    with tqdm(total=len(photos), desc=label, unit="photo") as bar:
        pairs = load_photos(photos, cfg.workers)
        while batch := list(islice(pairs, cfg.batch_size)):
            for _, image in batch:
                if isinstance(image, BadPhoto):
                    tqdm.write(f"skipped {image}", file=sys.stderr)
            batch_good = [(photo, image) for photo, image in batch if not isinstance(image, BadPhoto)]
            good += len(batch_good)
            if batch_good:
                yield batch_good
            bar.update(len(batch))
    if not good:
        raise NothingDone(f"none of {len(photos)} photos could be decoded")


def main(cfg: Config) -> None:
    check_settings(cfg)
    found = read_annotations(cfg.annotations, cfg.images, limit=cfg.limit) if cfg.annotations else None
    photos, notes = choose(found or find_photos(cfg.images, limit=cfg.limit), cfg)
    instances = read_instances(cfg.instances) if cfg.instances else None
    if instances and not any(photo.stem in instances.objects for photo in photos):
        raise UserError(f"instances: {cfg.instances} knows none of the photos of {cfg.images}")
    check_output(cfg.output / "index.html", overwrite=True)
    eye = open_eye(cfg)
    if found:
        eye.check_room(max(len(eye.ids(text)) for photo in photos for text in photo.captions))
    for older in ("index.html", "grounding.json"):
        (cfg.output / older).unlink(missing_ok=True)

    drawn: list[Drawn] = []
    table, grounded = GroundingTable(cfg.seed), {}  # photo -> captions, and what each names
    for batch in decoded(photos, cfg, "look"):
        captions = captions_of(eye, *map(list, zip(*batch)), cfg)
        looks = iter(look_all(eye, batch, captions))
        for (photo, image), own in zip(batch, captions):
            grid, masks = eye.grid(*image.size), masks_of(photo, image, instances) if instances else {}
            shape = (grid.rows, grid.columns)
            for number, (ids, look) in enumerate((ids, next(looks)) for ids in own):
                units = split_units(look, eye.tokenizer, cfg.unit)
                if not units:
                    tqdm.write(f"{photo.stem}: an empty caption, nothing to draw", file=sys.stderr)
                    continue
                maps = {name: method(look, units, shape) for name, method in METHODS.items()}
                named, objects = named_objects(units, masks, grid)
                if named:
                    for name in METHODS:
                        table.add(name, photo.stem, maps[name], named)
                    table.add_controls(photo.stem, maps[cfg.method], named, shape)
                    grounded.setdefault(photo, []).append((ids, named))
                if cfg.pictures and number == 0:
                    text = eye.text(ids)
                    one = reduced(Drawn(photo.stem, image, text, units, grid, maps, notes.get(photo.stem, ""), objects))
                    draw_words(one, cfg.method, cfg.output / f"{photo.stem}.png")
                    if cfg.sheet:
                        draw_methods(one, cfg.output / f"{photo.stem}.methods.png")
                    drawn.append(one)
    if drawn:
        write_heatmap_page(drawn, cfg.method, "Where each word looked", cfg.output / "index.html")
        print(f"{cfg.output}/index.html, and a PNG for each of {len(drawn)} photos")
    if grounded:
        measure_random_weights(eye, grounded, table, cfg)
        content, text = table.summary(cfg.method)
        settings = json.loads(json.dumps(asdict(cfg), default=str))
        write_json(cfg.output / "grounding.json", content | {"settings": settings})
        print(f"{text}\n{cfg.output}/grounding.json")
    elif instances:
        print("no caption names an object of its photo: nothing to ground")
    if not drawn and not grounded:
        raise NothingDone("nothing could be drawn or grounded")


def look_all(eye: Eye, batch: list[tuple[Photo, Image.Image]], captions: list[list[list[int]]]) -> list[Look]:
    """The looks of each photo's captions, in order."""
    pairs = [(photo, image, ids) for (photo, image), own in zip(batch, captions) for ids in own]
    return eye.look(*zip(*pairs)) if pairs else []


def measure_random_weights(
    eye: Eye, grounded: dict[Photo, list[tuple[list[int], list[Named]]]], table: GroundingTable, cfg: Config
) -> None:
    """The control of random weights, drawn three times: the same captions read by one that has learnt nothing."""
    for draw in range(3):
        seed_everything(cfg.seed + draw)
        eye.randomize()
        for batch in decoded(list(grounded), cfg, "random weights"):
            captions = [[ids for ids, _ in grounded[photo]] for photo, _ in batch]
            looks = iter(look_all(eye, batch, captions))
            for photo, image in batch:
                grid = eye.grid(*image.size)
                for _, named in grounded[photo]:
                    look = next(looks)
                    units = split_units(look, eye.tokenizer, cfg.unit)
                    for name in dict.fromkeys(("last_mean", cfg.method)):
                        maps = METHODS[name](look, units, (grid.rows, grid.columns))
                        table.add(f"random weights, {name}", photo.stem, maps, named)


if __name__ == "__main__":
    run(main, Config)
