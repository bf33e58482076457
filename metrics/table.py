"""The metrics that evaluate.py offers. To add one, write its function and add a line to METRICS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.instances import Instances
from metrics import overlap
from metrics.chair import chair
from metrics.cider import cider
from metrics.clipscore import WEIGHT, ClipVectors, clip_scores, ref_clip_scores
from metrics.statistics import Score, mean_score


@dataclass(frozen=True)
class Captioned:
    """The captions of a run, and what they are scored against."""

    captions: dict[str, str]
    references: dict[str, list[str]]
    idf: Literal["subset", "full"] = "subset"
    clip_scale: float = WEIGHT
    """What the cosine is multiplied by."""
    instances: Instances | None = None
    """The objects in the photos; None where CHAIR is not asked for."""
    clip: ClipVectors | None = None
    """None where no CLIP metric is asked for, or where CLIP cannot run."""


def _clip(run: Captioned) -> dict[str, Score]:
    """CLIPScore and, where CLIP has encoded references, RefCLIPScore; an empty caption scores 0."""
    if run.clip is None:
        return {}
    scores = clip_scores(run.clip.photos, run.clip.captions, run.clip_scale)
    scores *= scores.new_tensor([bool(run.captions[stem].strip()) for stem in run.clip.stems])
    values = {"clipscore": scores}
    if run.clip.references:
        values["refclipscore"] = ref_clip_scores(scores, run.clip.captions, run.clip.references)
    return {name: mean_score(dict(zip(run.clip.stems, of_photos.tolist()))) for name, of_photos in values.items()}


METRICS: dict[str, Callable[[Captioned], dict[str, Score]]] = {
    "cider": lambda run: {"cider": Score(*cider(run.references, run.captions, run.idf))},
    "clipscore": _clip,
    "refclipscore": _clip,
    "bleu": lambda run: overlap.bleu(run.references, run.captions),
    "rouge": lambda run: {"rouge": overlap.rouge(run.references, run.captions)},
    "meteor": lambda run: {"meteor": overlap.meteor(run.references, run.captions)},
    "spice": lambda run: {"spice": overlap.spice(run.references, run.captions)},
    "chair": lambda run: chair(run.references, run.captions, run.instances),
    "diversity": lambda run: overlap.diversity(run.captions),
}
"""What scores a run: one score or several, by the names that scores.json has."""

_LINES = Path(__file__).with_name("scores.txt").read_text(encoding="utf-8").splitlines()
LABELS = {name: label for name, label, _ in (line.split(": ", 2) for line in _LINES)}
"""How tables and pages call the scores."""
MEANINGS = {name: meaning for name, _, meaning in (line.split(": ", 2) for line in _LINES)}
"""What each score means, in one line."""
