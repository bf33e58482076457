"""What evaluate.py scores: the captions of one run or several, matched with photos and references, faults named."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import UserError, check
from data.annotations import find_data, read_annotations
from data.photos import Photo
from data.predictions import meta_path, read_predictions

LONG = 100  # words; a captioner that repeats itself without end

MissingPolicy = Literal["error", "skip", "zero"]


@dataclass(frozen=True)
class Predicted:
    """The captions of one run, in its file's order, of the photos that are scored."""

    name: str
    path: Path
    captions: dict[str, str]


def read_scored(
    predictions: list[Path],
    data: Path | None,
    annotations: Path | None,
    images: Path | None,
    split: str | None,
    limit: int | None,
    missing: MissingPolicy,
    photos_needed: bool,
    notice: Callable[[str], None],
) -> tuple[list[Predicted], list[Photo], dict[str, list[str]]]:
    """The runs, their photos (in the first run's order) and all references by stem.

    Every run is scored on the same photos, for a score depends on how many there are, and a mean over the photos that
    happen to have a caption would flatter a captioner that skips the hard ones. Raises UserError where predictions and
    photos do not match, as far as `missing` does not say what to do.
    """
    if not predictions:
        raise UserError("predictions: expected at least one file")
    twice = [path for path in set(predictions) if predictions.count(path) > 1]
    check([f"predictions: {path} is given twice" for path in twice])
    if data and images:
        raise UserError("images: expected either data or images, got both")
    if (data is None) == (annotations is None):
        raise UserError("annotations: expected either annotations or data, got " + ("both" if data else "neither"))
    runs = [read_predictions(path) for path in predictions]
    if data:
        (annotations, images), split = find_data(data, split or "val"), None
    annotated = read_annotations(annotations, images, split)
    by_stem = {photo.stem: photo for photo in annotated[:limit]}
    references = {photo.stem: list(photo.captions) for photo in annotated}

    problems, left_out = [], {}
    if photos_needed and any(photo.path is None for photo in by_stem.values()):
        problems.append("images: expected the folder of the photos, which CLIPScore reads; or give --metrics cider")
    for path, captions in zip(predictions, runs):
        unknown = [stem for stem in captions if stem not in references]
        if unknown:
            problems.append(f"annotations: {annotations} has no references for {first_of(unknown)} of {path}")
        skipped = _skipped_photos(path)
        absent = [stem for stem in by_stem if stem not in captions]
        undecoded = [stem for stem in absent if stem in skipped]
        absent = [stem for stem in absent if stem not in skipped]
        if undecoded:
            notice(f"{first_of(undecoded)} could not be decoded when captioning, and is not scored")
            left_out |= dict.fromkeys(undecoded)
        if absent and missing == "error":
            problems.append(
                f"predictions: {path} has no caption for {first_of(absent)} of {annotations}; caption them, give "
                "--missing skip or zero, or score against annotations of the captioned photos only (--limit takes the "
                "first so many)"
            )
        elif absent:
            done = "left out for all runs" if missing == "skip" else "scored 0"
            notice(f"{path} has no caption for {first_of(absent)}: {done}")
            left_out |= dict.fromkeys(absent) if missing == "skip" else {}
            captions |= dict.fromkeys(absent, "") if missing == "zero" else {}
        broken = [stem for stem, caption in captions.items() if len(caption.splitlines()) > 1]
        if broken:
            notice(f"{path}: line breaks in the caption of {first_of(broken)}, read as spaces")
        endless = [stem for stem, caption in captions.items() if len(caption.split()) > LONG]
        if endless:
            notice(f"{path}: more than {LONG} words in the caption of {first_of(endless)}; BLEU's lengths follow them")
    check(problems)
    scored = [stem for stem in runs[0] if stem in by_stem and stem not in left_out]
    if not scored:
        files = " and ".join(map(str, predictions))
        raise UserError(f"predictions: no photo of {annotations} has a caption in {files}")
    return (
        [
            # in one order, for a caption's tokens may depend on its neighbour
            Predicted(name, path, {stem: captions[stem] for stem in scored})
            for name, path, captions in zip(_names(predictions), predictions, runs)
        ],
        [by_stem[stem] for stem in scored],
        references,
    )


def _names(predictions: list[Path]) -> list[str]:
    """A short name a run: the file's, or its whole path where two files have one name."""
    short = [path.name.removesuffix(".json") for path in predictions]
    return short if len(set(short)) == len(short) else [str(path) for path in predictions]


def _skipped_photos(predictions: Path) -> set[str]:
    """Stems of the photos that could not be decoded, as the predictions' meta file says; none where there is none."""
    try:
        skipped = json.loads(meta_path(predictions).read_text(encoding="utf-8"))["skipped"]
        return {Path(name).stem for name in skipped}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def first_of(stems: list[str], shown: int = 5) -> str:
    """`3 photos (a, b, c)`, the rest counted."""
    rest = f" and {len(stems) - shown} more" if len(stems) > shown else ""
    return f"{len(stems)} photo{'s' * (len(stems) > 1)} ({', '.join(stems[:shown])}{rest})"
