"""P3: which patches of a photo each word of its caption looked at, and a number that says if they are the right ones.

    python p3_visualize.py --checkpoint checkpoints/flickr8k --images MY_PHOTOS --output heatmaps
    python p3_visualize.py --model llava-hf/llava-1.5-7b-hf --images MY_PHOTOS --output heatmaps --quantize 4bit
    python p3_visualize.py --checkpoint RUN --images PHOTOS --output heatmaps --scores scores.json --top 1 --bottom 1
    python p3_visualize.py --checkpoint RUN --images PHOTOS --output heatmaps --instances instances_val.json

The output folder gets a PNG for each photo (a tile for each word) and index.html, a page of all photos to read word by
word. With --instances, masks of what is in the photos, grounding.json and a table tell how well each method's maps lie
on what the words name, beside controls that show what chance gives.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from common.config import NothingDone, UserError, check, plain, run
from common.device import Precision, pick_device, seed_everything, torch_dtype
from common.files import check_output, folder_problems, write_json
from data.annotations import find_photos, read_annotations
from data.instances import Instances, read_instances
from data.photos import LoadedPhoto, Photo, PhotoBatches
from metrics.grounding import GroundingTable, Named, cover_on_grid, find_named
from metrics.object_words import phrases
from models.attention import AttentionRecord
from models.attribution import METHODS, Unit, split_units
from models.checkpoint import find_checkpoint, load_captioner
from models.decoding import Decoding, check_decoding, photo_seed
from models.encoder import PatchGrid
from models.interface import CaptionModel
from models.vlm import PROMPT, Quantize, check_model, check_quantize, load_vlm
from pages.heatmaps import Drawn, draw_words, page_entry, write_heatmap_page

DEFAULT = "rel"


@dataclass(frozen=True)
class Config:
    """Whose attention is drawn, on which photos, and how."""

    images: Path
    """Folder of photos, a photo, a text file with one path a line, or an annotation file."""
    output: Path
    """Folder to write."""
    overwrite: bool = False
    """Write into a folder that is there, over what it holds."""
    checkpoint: Path | None = None
    """A run folder of p2_train.py, or a checkpoint folder in it."""
    model: str | None = None
    """Instead of a checkpoint: a LLaVA of transformers, hub id or local folder."""
    prompt: str = PROMPT
    """What a LLaVA is asked."""
    method: Literal[tuple(METHODS)] = DEFAULT
    """Method of the PNGs, and the one that the page shows first; the README says what each is, and what it scored."""
    unit: Literal["word", "token"] = "word"
    """word joins sub-words; token shows them apart, the closing end token included."""
    scores: Path | None = None
    """Scores of evaluate.py (the first run's, of several), by which the best and the worst photos are taken."""
    by: str = "clipscore"
    """The metric of `scores` that decides."""
    top: NonNegativeInt = 1
    """So many photos with the highest score, where there are `scores`."""
    bottom: NonNegativeInt = 1
    """So many photos with the lowest score, where there are `scores`."""
    annotations: Path | None = None
    """Reference captions: the model reads these instead of captions of its own; the first of each photo is drawn."""
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
    """Decides sampling, the controls and the intervals."""
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
    problems += folder_problems(cfg.output, cfg.overwrite, "give another name, or --overwrite to write into it")
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


def load_model(cfg: Config) -> CaptionModel:
    """The model, made ready. Raises UserError."""
    device = pick_device(cfg.device)
    if cfg.model:
        check_quantize(cfg.quantize, device)
        model = load_vlm(cfg.model, cfg.prompt, device, torch_dtype(cfg.precision), cfg.quantize)
        model.patch_grid(1, 1)  # refuses a model whose patches cannot be placed
        return model
    model = load_captioner(find_checkpoint(cfg.checkpoint))
    model.check_room(cfg.decoding.max_new_tokens, "decoding.max_new_tokens")
    return model.ready(device, torch_dtype(cfg.precision), cfg.features)


def captions_of(model: CaptionModel, batch: list[LoadedPhoto], cfg: Config) -> list[list[list[int]]]:
    """Token ids of each photo's captions: its references where they are given, else the model's own caption."""
    if cfg.annotations:
        return [[model.ids(text) for text in loaded.photo.captions] for loaded in batch]
    seeds = [photo_seed(cfg.seed, photo.stem) for photo in batch]
    return [[ids] for ids in model.generate(batch, {"caption": cfg.decoding}, {"caption": seeds})["caption"]]


# ------------------------------------------------------------------------------------------- one caption


def masks_of(loaded: LoadedPhoto, instances: Instances | None) -> dict[str, np.ndarray]:
    """The photo's masks by category; none, said on stderr, where they have another size than the photo."""
    if instances is None:
        return {}
    image = loaded.image
    height, width = instances.sizes.get(loaded.stem, image.size[::-1])
    if (width, height) != image.size:
        tqdm.write(
            f"{loaded.photo.path} has {image.width} x {image.height} pixels, its masks {width} x {height}: it is not "
            "grounded; the photos are needed in the size in which they were annotated",
            file=sys.stderr,
        )
        return {}
    return instances.masks(loaded.stem)


def named_objects(units: Sequence[Unit], masks: dict[str, np.ndarray], grid: PatchGrid) -> list[Named]:
    """The objects that a caption names, that are in its photo and that the model saw."""
    places = find_named([unit.text for unit in units], {name: phrases(name) for name in masks})
    shape = (grid.rows, grid.columns)
    named = [Named(name, words, cover_on_grid(masks[name], grid.box, shape)) for name, words in places]
    return [one for one in named if one.cover.max() > 0]


def maps_of(record: AttentionRecord, units: Sequence[Unit], grid: PatchGrid, methods: Sequence[str]) -> dict:
    """{method: (W, P)} maps of a caption's words."""
    return {name: METHODS[name](record, units, (grid.rows, grid.columns)) for name in methods}


# ------------------------------------------------------------------------------------------- the control


def measure_random_weights(
    model: CaptionModel, grounded: dict[Photo, list[tuple[list[int], list[Named]]]], table: GroundingTable, cfg: Config
) -> None:
    """Add the control of random weights to `table`: the same captions, read by a model that has learnt nothing."""
    seed_everything(cfg.seed)
    model.randomize()
    methods = list(dict.fromkeys(("last_mean", cfg.method)))
    for batch in PhotoBatches(list(grounded), cfg.batch_size, cfg.workers, "random weights"):
        captions = [[ids for ids, _ in grounded[loaded.photo]] for loaded in batch]
        for loaded, records in zip(batch, model.attend(batch, captions)):
            grid = model.patch_grid(*loaded.image.size)
            for record, (_, named) in zip(records, grounded[loaded.photo]):
                units = split_units(record, model.tokenizer, cfg.unit)
                for name, maps in maps_of(record, units, grid, methods).items():
                    table.add(f"random weights, {name}", loaded.stem, maps, named)


# ------------------------------------------------------------------------------------------- the script


def read_inputs(cfg: Config) -> tuple[list[Photo], dict[str, str], Instances | None]:
    """The photos, a note for each that was chosen by its score, and the masks. Raises UserError."""
    if cfg.annotations:
        photos = read_annotations(cfg.annotations, cfg.images, limit=cfg.limit)
    else:
        photos = find_photos(cfg.images, limit=cfg.limit)
    photos, notes = choose(photos, cfg)
    instances = read_instances(cfg.instances) if cfg.instances else None
    if instances and not any(photo.stem in instances.objects for photo in photos):
        raise UserError(f"instances: {cfg.instances} has none of the photos of {cfg.images}")
    return photos, notes, instances


def finish(drawn: list[dict], table: GroundingTable, grounded: bool, cfg: Config) -> None:
    """Write the page and the grounding scores, and print where they are. Raises NothingDone where there is neither."""
    if drawn:
        write_heatmap_page(drawn, cfg.method, "Where each word looked", cfg.output / "index.html")
        print(f"{cfg.output}/index.html, and a PNG for each of {len(drawn)} photos")
    if grounded:
        content, text = table.summary(cfg.method)
        write_json(cfg.output / "grounding.json", content | {"settings": plain(cfg)})
        print(f"{text}\n{cfg.output}/grounding.json")
    elif cfg.instances:
        print("no caption names an object of its photo: nothing to ground")
    if not drawn and not grounded:
        raise NothingDone("nothing could be drawn or grounded")


def main(cfg: Config) -> None:
    check_settings(cfg)
    photos, notes, instances = read_inputs(cfg)
    check_output(cfg.output / "index.html", overwrite=True)
    model = load_model(cfg)
    if cfg.annotations:
        model.check_room(max(len(model.ids(text)) for photo in photos for text in photo.captions), "annotations")
    for older in ("index.html", "grounding.json"):
        (cfg.output / older).unlink(missing_ok=True)

    drawn: list[dict] = []
    table, grounded = GroundingTable(cfg.seed), {}  # photo -> its captions, and what each names
    for batch in PhotoBatches(photos, cfg.batch_size, cfg.workers, "attention"):
        captions = captions_of(model, batch, cfg)
        for loaded, records in zip(batch, model.attend(batch, captions)):
            grid, masks = model.patch_grid(*loaded.image.size), masks_of(loaded, instances)
            for number, record in enumerate(records):
                units = split_units(record, model.tokenizer, cfg.unit)
                if not units:
                    tqdm.write(f"{loaded.stem}: an empty caption, nothing to draw", file=sys.stderr)
                    continue
                maps, named = maps_of(record, units, grid, list(METHODS)), named_objects(units, masks, grid)
                if named:
                    for name in METHODS:
                        table.add(name, loaded.stem, maps[name], named)
                    table.add_controls(loaded.stem, maps[cfg.method], named, (grid.rows, grid.columns))
                    grounded.setdefault(loaded.photo, []).append((record.ids[:-1], named))
                if cfg.pictures and number == 0:
                    objects, note = (
                        {one.name: (one.words, masks[one.name]) for one in named},
                        notes.get(loaded.stem, ""),
                    )
                    text = model.text(record.ids[:-1])
                    shown = Drawn(loaded.stem, loaded.image, text, units, grid, maps, note, objects)
                    draw_words(shown, cfg.method, cfg.output / f"{loaded.stem}.png")
                    drawn.append(page_entry(shown))
    if grounded:
        measure_random_weights(model, grounded, table, cfg)
    finish(drawn, table, bool(grounded), cfg)


if __name__ == "__main__":
    run(main, Config)
