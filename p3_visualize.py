"""P3: which patches of a photo each word of its caption looked at, and a number that says if they are the right ones.

    python p3_visualize.py --checkpoint checkpoints/flickr8k --images MY_PHOTOS --output heatmaps
    python p3_visualize.py --model llava-hf/llava-1.5-7b-hf --images MY_PHOTOS --output heatmaps --quantize 4bit
    python p3_visualize.py --checkpoint RUN --images PHOTOS --output heatmaps --scores scores.json --top 1 --bottom 1
    python p3_visualize.py --checkpoint RUN --images PHOTOS --output heatmaps --instances instances_val.json

The output folder gets a PNG for each photo (a tile for each word) and index.html, a page of all photos to read word by
word. With --instances, masks of what is in the photos, grounding.json and a table tell how well each method's maps lie
on what the words name, beside controls that show what chance gives. A stopped run goes on in its folder when the same
command is given again; with --instances it begins anew there.
"""

import common  # noqa: F401  Ctrl-C ends what is loaded below without a traceback

# isort: split
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from common.config import CommonSettings, NothingDone, UserError, check, plain, run, say
from common.device import Precision, pick_device, torch_dtype
from common.files import FEATURES, check_apart, files_hash, folder_problems, lock, read_text, remove_parts, write_json
from data.annotations import find_photos, read_annotations
from data.instances import Instances, read_instances
from data.journal import PhotoRows
from data.photos import LoadedPhoto, Photo, PhotoBatches
from metrics.grounding import GroundingTable, Named, cover_on_grid, find_named
from models.attention import EXTRAS, AttentionRecord
from models.attribution import CHEAP, METHODS, Unit, split_units
from models.checkpoint import checkpoint_hash, load_captioner
from models.decoding import Decoding, check_decoding, photo_seed
from models.interface import CaptionModel
from models.vlm import PROMPT, Fit, Quantize, load_vlm
from pages.heatmaps import Drawn, draw_words, page_entry, write_heatmap_page

UNFINISHED = "unfinished.jsonl"  # in the output folder, until all is done
Look = tuple[LoadedPhoto, int, AttentionRecord, Drawn, list[Named]]
Grounded = dict[Photo, list[tuple[list[int], list[Unit], list[Named]]]]  # a photo's captions, with what each names


@dataclass(frozen=True)
class Config(CommonSettings):
    """Whose attention is drawn, on which photos, and how."""

    images: list[Path]
    """Folders of photos, photos, patterns such as 'photos/*.jpg', lists with one path a line, or annotation files."""
    output: Path
    """Folder to write."""
    checkpoint: Path | None = None
    """A run folder of p2_train.py, a checkpoint folder in it, or USER/NAME of the model hub."""
    model: str | None = None
    """Instead of a checkpoint: a vision-language model of transformers, hub id or local folder."""
    prompt: str = PROMPT
    """What `model` is asked."""
    method: Literal[tuple(METHODS)] = "fuse"
    """Method of the PNGs, and the first one on the page; docs/grounding.md says what each is and how well it does."""
    methods: list[Literal[tuple(METHODS)]] = field(default_factory=lambda: list(CHEAP))
    """Methods of the page and of the scores; heads, rollout, gradcam and relevancy cost more than the others."""
    scores: Path | None = None
    """Scores of evaluate.py (the first run's, of several), by which the best and the worst photos are taken."""
    by: str = "clipscore"
    """The metric of `scores` that decides."""
    top: NonNegativeInt = 1
    """With `scores`: how many photos with the highest score to draw."""
    bottom: NonNegativeInt = 1
    """With `scores`: how many photos with the lowest score to draw."""
    annotations: Path | None = None
    """Reference captions: the model reads these instead of captions of its own; the first of each photo is drawn."""
    instances: Path | None = None
    """COCO instances with masks of the photos' objects: outlines on the page, and grounding scores."""
    decoding: Decoding = Decoding()
    """How a caption is chosen; greedy by default."""
    recursive: bool = False
    """Enter the subfolders of `images` too; photos of one name are then told apart by their folders."""
    batch_size: PositiveInt = 8
    """Photos at a time."""
    workers: PositiveInt = 2
    """Threads that decode photos ahead."""
    precision: Precision = "float32"
    """float32 is exact; bf16 and fp16 are faster where the hardware multiplies them well."""
    features: Path = FEATURES
    """Folder of features that training stored. They are read, so that those photos are not encoded again."""
    fit: Fit = "processor"
    """Of `model`. processor: photos as its processor takes them; pad: padded to squares, as in LLaVA-1.5's training."""
    quantize: Quantize = "none"
    """Hold the weights of `model` in 8 or 4 bits, by bitsandbytes on a CUDA GPU."""
    pictures: bool = True
    """False: measure the grounding and draw nothing."""


def check_settings(cfg: Config) -> None:
    """Raise a UserError for what is wrong with the settings alone."""
    problems = check_decoding("decoding", cfg.decoding)
    if (cfg.checkpoint is None) == (cfg.model is None):
        problems.append("checkpoint: expected either checkpoint or model, got " + ("both" if cfg.model else "neither"))
    if (cfg.quantize, cfg.fit) != ("none", "processor") and not cfg.model:
        problems.append("quantize, fit: these settings are of a vision-language model; expected model with them")
    if cfg.instances and cfg.quantize != "none":
        problems.append("instances: a control of grounding redraws the weights; expected quantize none with it")
    if not cfg.pictures and not cfg.instances:
        problems.append("pictures: false leaves the grounding scores alone to be done; expected instances with it")
    replace = cfg.overwrite or (cfg.output / UNFINISHED).exists()
    problems += folder_problems(cfg.output, replace, "give another name, or --overwrite to write into it")
    check(problems)


def choose(photos: list[Photo], cfg: Config) -> tuple[list[Photo], dict[str, str]]:
    """The photos to draw, and a note for each that was chosen by its score. Raises UserError."""
    if cfg.scores is None:
        return photos, {}
    try:
        content = json.loads(read_text(cfg.scores, "scores of evaluate.py"))
        scores = content.get("runs", [content])[0]["photos"]
        found = {stem: float(one[cfg.by]) for stem, one in scores.items() if one[cfg.by] is not None}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise UserError(f"scores: {cfg.scores}: expected a file of evaluate.py's, {cfg.by} in it") from None
    scored = sorted((photo for photo in photos if photo.stem in found), key=lambda photo: -found[photo.stem])
    notes = {photo.stem: f"worst by {cfg.by}: {found[photo.stem]:.3f}" for photo in scored[::-1][: cfg.bottom]}
    notes |= {photo.stem: f"best by {cfg.by}: {found[photo.stem]:.3f}" for photo in scored[: cfg.top]}
    if not notes:
        raise UserError(f"scores: top {cfg.top}, bottom {cfg.bottom} and {cfg.scores} choose no photo of {cfg.images}")
    return [photo for photo in scored if photo.stem in notes], notes


def load_model(cfg: Config, photos: list[Photo]) -> CaptionModel:
    """The model, made ready for these photos and their captions. Raises UserError."""
    device = pick_device(cfg.device)
    if cfg.model:
        return load_vlm(cfg.model, cfg.prompt, device, torch_dtype(cfg.precision), cfg.quantize, cfg.fit, True)
    model = load_captioner(cfg.checkpoint)
    model.check_room(cfg.decoding.max_new_tokens, "decoding.max_new_tokens")
    if cfg.annotations:
        model.check_room(max(len(model.ids(text)) for photo in photos for text in photo.captions), "annotations")
    return model.ready(device, torch_dtype(cfg.precision), cfg.features)


def picture_name(photo: Photo) -> str:
    """The file of a photo's picture; names have 255 bytes at most."""
    return photo.stem.encode()[-250:].decode(errors="ignore") + ".png"


def captions_of(model: CaptionModel, batch: list[LoadedPhoto], cfg: Config) -> list[list[list[int]]]:
    """Token ids of each photo's captions: its references where they are given, else the model's own caption."""
    if cfg.annotations:
        return [[model.ids(text) for text in loaded.photo.captions] for loaded in batch]
    seeds = [photo_seed(cfg.seed, photo.stem) for photo in batch]
    return [[ids] for ids in model.generate(batch, {"caption": cfg.decoding}, {"caption": seeds})["caption"]]


# ------------------------------------------------------------------------------------------- one caption


def masks_of(loaded: LoadedPhoto, instances: Instances) -> dict[str, np.ndarray]:
    """The photo's masks by category; none, said on stderr, where they have another size than the photo."""
    width, height = loaded.image.size
    rows, columns = instances.sizes.get(loaded.stem, (height, width))
    if (rows, columns) == (height, width):
        return instances.masks(loaded.stem)
    sizes = f"{loaded.photo.path} has {width} x {height} pixels, its masks {columns} x {rows}"
    say(f"{sizes}: it is not grounded; photos are needed in the size that was annotated")
    return {}


def look(model: CaptionModel, photos: list[Photo], instances: Instances | None, cfg: Config, done=0) -> Iterator[Look]:
    """Where the words of each caption looked, by all methods that are made; `done` photos were looked at before.

    Gives the photo, the caption's number among its captions, the record, the maps, and the objects that are named.
    """
    names = [name for name in METHODS if name in {*cfg.methods, cfg.method}]
    for batch in PhotoBatches(photos, cfg.batch_size, cfg.workers, "attention", done=done):
        for loaded, records in zip(batch, model.attend(batch, captions_of(model, batch, cfg), {*names} & {*EXTRAS})):
            grid, masks = model.patch_grid(*loaded.image.size), masks_of(loaded, instances) if instances else {}
            shape = (grid.rows, grid.columns)
            covers = {name: cover_on_grid(mask, grid.box, shape) for name, mask in masks.items()}
            for number, record in enumerate(records):
                units = split_units(record, model.tokenizer)
                if not units:
                    say(f"{loaded.stem}: an empty caption, nothing to draw")
                    continue
                maps = {name: METHODS[name].maps(record, units, shape) for name in names}
                named, text = find_named([unit.text for unit in units], covers), model.text(record.ids[:-1])
                objects = {one.name: (one.words, masks[one.name]) for one in named}
                shown = Drawn(loaded.stem, loaded.image, text, units, grid, maps, objects=objects)
                yield loaded, number, record, shown, named


# ------------------------------------------------------------------------------------------- the control


def measure_random_weights(model: CaptionModel, grounded: Grounded, table: GroundingTable, cfg: Config) -> None:
    """Add the control of random weights to `table`: the same captions, read by a model that has learnt nothing."""
    torch.manual_seed(cfg.seed)
    model.randomize()
    made = "last_mean", cfg.method
    for batch in PhotoBatches(list(grounded), cfg.batch_size, cfg.workers, "random weights"):
        captions = [[ids for ids, *_ in grounded[loaded.photo]] for loaded in batch]
        for loaded, records in zip(batch, model.attend(batch, captions, {cfg.method} & set(EXTRAS))):
            grid = model.patch_grid(*loaded.image.size)
            shape = (grid.rows, grid.columns)
            for record, (_, units, named) in zip(records, grounded[loaded.photo]):
                rows = {f"random weights, {name}": METHODS[name].maps(record, units, shape) for name in made}
                table.add(loaded.stem, rows, named, [unit.text for unit in units])


# ------------------------------------------------------------------------------------------- the script


def read_inputs(cfg: Config) -> tuple[list[Photo], dict[str, str], Instances | None]:
    """The photos, a note for each that was chosen by its score, and the masks. Raises UserError."""
    if cfg.annotations:
        photos = read_annotations(cfg.annotations, cfg.images, limit=cfg.limit, missing=True)
    else:
        photos = find_photos(cfg.images, cfg.limit, cfg.recursive, cfg.output)
    check_apart([cfg.output / picture_name(photo) for photo in photos], [photo.path for photo in photos])
    photos, notes = choose(photos, cfg)
    instances = read_instances(cfg.instances) if cfg.instances else None
    if instances and not any(photo.stem in instances.objects for photo in photos):
        raise UserError(f"instances: {cfg.instances} has none of these photos")
    return photos, notes, instances


def finish(drawn: list[dict], table: GroundingTable, cfg: Config) -> None:
    """Write the page and the grounding scores, and print where they are. Raises NothingDone where there is neither."""
    if drawn:
        write_heatmap_page(drawn, cfg.method, "Where each word looked", cfg.output / "index.html")
        print(f"{cfg.output}/index.html, and a PNG for each of {len(drawn)} photos")
    if table.parts:
        content, text = table.summary(cfg.method)
        write_json(cfg.output / "grounding.json", content | {"settings": plain(cfg)})
        print(f"{text}\n{cfg.output}/grounding.json")
    elif cfg.instances:
        print("no caption names an object of its photo: nothing to ground")
    if not drawn and not table.parts:
        raise NothingDone("nothing could be drawn or grounded")


def main(cfg: Config) -> None:
    check_settings(cfg)
    photos, notes, instances = read_inputs(cfg)
    lock(cfg.output / "index.html")
    files = {"overwrite": None, "model_files": files_hash(cfg.model) if cfg.model else checkpoint_hash(cfg.checkpoint)}
    rows = PhotoRows(cfg.output / UNFINISHED, plain(cfg) | files, cfg.overwrite)
    model = load_model(cfg, photos)
    remove_parts(cfg.output)
    rows.begin()  # by its file the next start knows this folder
    for older in ("index.html", "grounding.json"):
        (cfg.output / older).unlink(missing_ok=True)

    about = {photo.stem: [list(photo.captions), notes.get(photo.stem)] for photo in photos}
    drawn = {photo.stem: None if instances else rows.get(photo, about[photo.stem]) for photo in photos}
    left = [photo for photo in photos if not drawn[photo.stem]]
    grounded, table = {}, GroundingTable(cfg.seed)
    for loaded, number, record, shown, named in look(model, left, instances, cfg, len(photos) - len(left)):
        if named:
            controls = table.controls(shown.maps[cfg.method], named, (shown.grid.rows, shown.grid.columns))
            table.add(loaded.stem, shown.maps | controls, named, [unit.text for unit in shown.units])
            grounded.setdefault(loaded.photo, []).append((record.ids[:-1], shown.units, named))
        if cfg.pictures and number == 0:
            shown.note = notes.get(loaded.stem, "")
            draw_words(shown, cfg.method, cfg.output / picture_name(loaded.photo))
            drawn[loaded.stem] = page_entry(shown)
            rows.append(loaded, drawn[loaded.stem], about[loaded.stem])
    if grounded:
        measure_random_weights(model, grounded, table, cfg)
    finish([entry for entry in drawn.values() if entry], table, cfg)
    (cfg.output / UNFINISHED).unlink(missing_ok=True)


if __name__ == "__main__":
    run(main, Config)
