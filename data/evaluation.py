"""What evaluate.py scores: captions of one or more runs, matched with the photos and their references."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.config import UserError, check
from data.annotations import find_data, read_annotations
from data.forms import UNSPACED
from data.names import finder
from data.photos import Photo, first_of
from data.predictions import meta_path, read_predictions, wrong_in_form

MissingPolicy = Literal["error", "skip", "zero"]


@dataclass(frozen=True)
class Run:
    """The captions of one run by the photos' stems."""

    name: str
    path: Path
    captions: dict[str, str]
    undecoded: frozenset[str]
    """The photos that the run could not decode, as the meta file of its predictions says."""
    cut: frozenset[str]
    """Those whose captions ended at the last allowed token, as the meta file says."""


@dataclass(frozen=True)
class Inputs:
    """All that is scored: every run has one caption for every photo."""

    runs: list[Run]
    """Their captions are in the order of `photos`, because the tokens of a caption may depend on its neighbour."""
    photos: list[Photo]
    """The scored photos, in the order of the first run."""
    references: dict[str, list[str]]
    """References of all annotated photos by stem, also of those that are not scored."""
    notices: list[str]
    """What the user should know about the captions, one line each."""


def read_runs(predictions: list[Path], annotated: list[Photo]) -> list[Run]:
    """The captions of each file. A run has its file's name, or the whole path where two files have the same name.

    A file may name a photo by its stem, its file or its id, or alike (`data.names`). Raises UserError where a file is
    no such file, and where two of its captions are of the same photo.
    """
    check([f"predictions: {path} is given twice" for path, count in Counter(predictions).items() if count > 1])
    names = [path.name.removesuffix(".json") for path in predictions]
    if len(set(names)) < len(names):
        names = list(map(str, predictions))
    find = finder((photo.stem, photo.id) for photo in annotated)
    return [_read_run(name, path, find) for name, path in zip(names, predictions)]


def _read_run(name: str, path: Path, find: Callable[[str], str | None]) -> Run:
    given = read_predictions(path)
    captions = {find(photo) or photo: caption for photo, caption in given.items()}
    check([f"predictions: {path}: two captions of a photo, by other names"] * (len(captions) < len(given)))
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
        named = meta["skipped"], meta.get("form", {}).get("cut", ())
        undecoded, cut = (frozenset(find(photo) or photo for photo in photos) for photos in named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # captions of other programs have no meta file
        undecoded = cut = frozenset()
    return Run(name, path, captions, undecoded, cut)


def read_references(
    data: Path | None, annotations: Path | None, images: Path | None, split: str | None, missing: MissingPolicy
) -> tuple[Path, list[Photo]]:
    """The annotation file, given or found in the folder `data`, and its photos. Raises UserError."""
    if (data is None) == (annotations is None) or (data and images):
        raise UserError("data: expected either data, or annotations and images, got " + ("both" if data else "neither"))
    if data:
        (annotations, images), split = find_data(data, split or "val"), None
    return annotations, read_annotations(annotations, images, split, missing=missing == "skip")


def match(
    runs: list[Run], annotated: list[Photo], annotations: Path, limit: int | None, missing: MissingPolicy, clip: bool
) -> Inputs:
    """Choose the photos to score: the first `limit` of the annotations, without those that `missing` leaves out.

    Every run is scored on the same photos: a score depends on their number, and a mean over only the captioned
    photos would favour a run that skips the hard ones. Raises UserError where captions and photos do not match and
    `missing` does not say what to do, and where `clip` is true and the photos' files are not known.
    """
    references = {photo.stem: list(photo.captions) for photo in annotated}
    photos = {photo.stem: photo for photo in annotated[:limit]}
    longest = {stem: max(len(text.split()) for text in texts) for stem, texts in references.items()}
    problems, notices, left_out = [], [], set()
    if clip and any(photo.path is None for photo in photos.values()):
        problems.append("images: expected the folder of the photos, which CLIPScore reads; or give --metrics cider")
    for run in runs:
        unknown = [stem for stem in run.captions if stem not in references]
        if unknown:
            named = f"{first_of(unknown)} of {run.path}; it names photos like {next(iter(references))!r}"
            problems.append(f"annotations: {annotations} has no references for {named}")
        undecoded = [stem for stem in photos if stem not in run.captions and stem in run.undecoded]
        absent = [stem for stem in photos if stem not in run.captions and stem not in run.undecoded]
        left_out.update(undecoded, absent if missing == "skip" else ())
        if absent and missing == "error":
            hint = "caption them, give --missing skip or zero, or annotations (or --limit) of the captioned photos only"
            problems.append(f"predictions: {run.path} has no caption for {first_of(absent)} of {annotations}; {hint}")
        notices += _notices(run, longest, undecoded, absent, missing)
    check(problems)

    scored = [stem for stem in dict.fromkeys([*runs[0].captions, *photos]) if stem in photos and stem not in left_out]
    if not scored:
        raise UserError(f"predictions: no photo of {annotations} has a caption in each run")
    # a caption can be absent here only where `missing` is zero
    runs = [replace(run, captions={stem: run.captions.get(stem, "") for stem in scored}) for run in runs]
    return Inputs(runs, [photos[stem] for stem in scored], references, notices)


def _notices(run: Run, longest: dict[str, int], undecoded: list[str], absent: list[str], missing: str) -> list[str]:
    unspaced = [stem for stem, caption in run.captions.items() if UNSPACED.search(caption)]
    # CIDEr and BLEU say little about a caption of more than twice the words of any reference
    long = [stem for stem, text in run.captions.items() if len(text.split()) > 2 * longest.get(stem, float("inf"))]
    found = {
        "not decoded by the run, left out for all runs": undecoded,
        f"no caption, {'left out for all runs' if missing == 'skip' else 'scored 0'}": absent,
        "captions without spaces between words, of which CIDEr and BLEU say nothing": unspaced,
        "captions too long for CIDEr and BLEU, which are not made for paragraphs": long,
    }
    found |= {f"captions {kind}": stems for kind, stems in wrong_in_form(run.captions, run.cut).items()}
    return [f"{run.path}: {about}: {first_of(stems)}" for about, stems in found.items() if stems]
