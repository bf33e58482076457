"""Score captions against references and photos: CIDEr and CLIPScore.

    python evaluate.py --predictions captions.json --annotations val.json --images photos/
    python evaluate.py --predictions captions.json --annotations val.json --metrics cider

The second needs no photo and no model: seconds on a CPU. `--pred_file`, `--images_root` and `--annotation_file` are
read as other names of these three. Scores of every photo go to a JSON file, the two means to the last line of stdout.
"""

import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from common import NothingDone, UserError, check, check_output, pick_device, run, write_json
from data.annotations import Photo, find_data, read_annotations
from data.images import BadPhoto, load_photos
from data.predictions import meta_path, read_predictions
from metrics.cider import cider, find_java
from metrics.clipscore import Clip, ClipUnavailable, clip_scores, load_clip

ALIASES = {"pred_file": "predictions", "images_root": "images", "annotation_file": "annotations"}


@dataclass(frozen=True)
class Config:
    """What is scored, against what, and how."""

    predictions: Path
    """JSON file {image stem: caption}."""
    data: Path | None = None
    """Folder with val.json (or SPLIT.json) and images/; or name the two below."""
    annotations: Path | None = None
    """The references: COCO style, Karpathy's JSON, Flickr8k's token file or a CSV of image,caption."""
    images: Path | None = None
    """Folder of the photos; only CLIPScore reads them, and finds them itself where they lie beside the annotations."""
    metrics: list[Literal["cider", "clipscore"]] = field(default_factory=lambda: ["cider", "clipscore"])
    """What to score: cider (CIDEr-D on PTB tokens), clipscore (2.5 * max(cos, 0), no references)."""
    idf: Literal["subset", "full"] = "subset"
    """References that weigh CIDEr's n-grams: of the scored photos (the official way), or all of the annotations."""
    split: str | None = None
    """Split to score: of the annotations, where they hold several, or of `data` (val without it)."""
    limit: PositiveInt | None = None
    """Score the first so many photos of the annotations; predictions for the others are left aside."""
    clip_model: str = "ViT-B-32-quickgelu"
    """A model name of open_clip, local-dir:FOLDER or hf-hub:REPO."""
    clip_pretrained: str = "openai"
    """open_clip's tag of the weights, or a weights file; not read with local-dir: and hf-hub:."""
    batch_size: PositiveInt = 32
    """Photos that CLIP takes at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    output: Path | None = None
    """Scores as JSON; without it NAME.scores.json beside the predictions NAME.json, where older scores are replaced."""
    overwrite: bool = False
    """Replace an `output` that is there."""


def notice(text: str) -> None:
    print(f"evaluate.py: {text}", file=sys.stderr)


def read_inputs(cfg: Config) -> tuple[list[Photo], dict[str, str], dict[str, list[str]]]:
    """The photos to score and their captions, both in the order of the predictions, and all references by stem.

    Raises UserError unless predictions and photos match one to one: a mean over the photos that happen to have
    a caption would flatter a captioner that skips the hard ones.
    """
    if not cfg.metrics:
        raise UserError("metrics: expected at least one of cider, clipscore, got none")
    if (cfg.data is None) == (cfg.annotations is None):
        raise UserError("annotations: expected either annotations or data, got " + ("both" if cfg.data else "neither"))
    predictions = read_predictions(cfg.predictions)
    clip = "clipscore" in cfg.metrics
    annotations, images, split = cfg.annotations, cfg.images, cfg.split
    if cfg.data:
        (annotations, images), split = find_data(cfg.data, cfg.split or "val"), None
    annotated = read_annotations(annotations, images if clip else None, split)
    photos = annotated[: cfg.limit]
    references = {photo.stem: list(photo.captions) for photo in annotated}

    skipped = skipped_photos(cfg.predictions)
    missing = [photo.stem for photo in photos if photo.stem not in predictions and photo.stem not in skipped]
    unknown = [stem for stem in predictions if stem not in references]
    problems = []
    if missing:
        problems.append(
            f"predictions: {cfg.predictions} has no caption for {_named(missing)} of {annotations}; caption them, "
            "or score against annotations of the captioned photos only (--limit takes the first so many)"
        )
    if unknown:
        problems.append(f"annotations: {annotations} has no references for {_named(unknown)} of {cfg.predictions}")
    if clip and any(photo.path is None for photo in photos):
        problems.append("images: expected the folder of the photos, which CLIPScore reads; or give --metrics cider")
    check(problems)
    by_stem = {photo.stem: photo for photo in photos}
    left_out = [photo.stem for photo in photos if photo.stem not in predictions]
    if left_out:
        notice(f"{_named(left_out)} could not be decoded when captioning, and is not scored")
    photos = [by_stem[stem] for stem in predictions if stem in by_stem]
    return photos, {photo.stem: predictions[photo.stem] for photo in photos}, references


def skipped_photos(predictions: Path) -> set[str]:
    """Stems of the photos that could not be decoded, as the predictions' meta file says; none where there is none."""
    try:
        skipped = json.loads(meta_path(predictions).read_text(encoding="utf-8"))["skipped"]
        return {Path(name).stem for name in skipped}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _named(stems: list[str], shown: int = 5) -> str:
    rest = f" and {len(stems) - shown} more" if len(stems) > shown else ""
    return f"{len(stems)} photo{'s' * (len(stems) > 1)} ({', '.join(stems[:shown])}{rest})"


def scores_path(cfg: Config) -> Path:
    """Where the scores go. Raises UserError where they cannot, or would replace something other than older scores."""
    path = cfg.output or cfg.predictions.with_name(cfg.predictions.name.removesuffix(".json") + ".scores.json")
    check_output(path, cfg.overwrite or cfg.output is None)
    if path.exists():
        try:
            older = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            older = None
        if not (isinstance(older, dict) and "corpus" in older):
            raise UserError(f"output: {path} exists and holds no scores; give another name")
    return path


def score_with_clip(clip: Clip, photos: list[Photo], captions: dict[str, str], batch_size: int) -> dict[str, float]:
    """CLIPScore by stem, without the photos that cannot be decoded: those are named on stderr."""

    def readable():
        for photo, image in load_photos(photos):
            if isinstance(image, BadPhoto):
                notice(f"{image}; it gets no CLIPScore")
            else:
                yield photo.stem, image

    scores, cut = clip_scores(clip, readable(), captions, batch_size)
    if cut:
        notice(f"CLIP reads {_named(cut)} only in part: the captions are longer than its text input")
    return scores


def fixed_point(score: float | None) -> str:
    """All digits of a score, never in scientific notation; `n/a` where there is none."""
    import numpy

    return "n/a" if score is None else numpy.format_float_positional(score, trim="0")


def main(cfg: Config) -> None:
    photos, captions, references = read_inputs(cfg)
    output = scores_path(cfg)
    versions = {"pycocoevalcap": version("pycocoevalcap")}
    if "cider" in cfg.metrics:
        find_java()
    clip, unavailable = None, ""
    if "clipscore" in cfg.metrics:
        try:
            clip = load_clip(cfg.clip_model, cfg.clip_pretrained, pick_device(cfg.device))
        except ClipUnavailable as reason:
            unavailable = f"CLIPScore: {reason}"
        else:
            versions |= {"open_clip": version("open_clip_torch"), "clip": clip.name}

    corpus: dict[str, float | None] = {"cider": None, "clipscore": None}
    by_photo: dict[str, dict[str, float]] = {"cider": {}, "clipscore": {}}
    if "cider" in cfg.metrics:
        corpus["cider"], by_photo["cider"] = cider(references, captions, cfg.idf)
        if len(captions) == 1 and cfg.idf == "subset":
            notice("CIDEr of one photo alone is 0, whatever its caption: no n-gram is rarer than another")
    if clip:
        scores = by_photo["clipscore"] = score_with_clip(clip, photos, captions, cfg.batch_size)
        if scores:
            corpus["clipscore"] = sum(scores.values()) / len(scores)
        else:
            unavailable = "CLIPScore: none of the photos can be read"
        if 0 < len(scores) < len(photos):
            notice(f"CLIPScore is the mean of {len(scores)} of {len(photos)} photos")

    if any(by_photo.values()):
        per_photo = {stem: {metric: by_photo[metric].get(stem) for metric in corpus} for stem in captions}
        write_json(
            output, {"n": len(photos), "idf": cfg.idf, "versions": versions, "corpus": corpus, "photos": per_photo}
        )
        print(f"{len(photos)} photos; CIDEr is CIDEr-D, idf {cfg.idf}; scores of each in {output}")
        if unavailable:
            notice(unavailable)
    print(f"CIDEr: {fixed_point(corpus['cider'])} | CLIPScore: {fixed_point(corpus['clipscore'])}")
    if not any(by_photo.values()):
        raise NothingDone(unavailable)


if __name__ == "__main__":
    run(main, Config, ALIASES)
