"""The metrics that evaluate.py offers. To add one, write its function and add a line to METRICS."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from metrics import overlap
from metrics.cider import cider
from metrics.clipscore import ClipVectors, clip_scores, ref_clip_scores
from metrics.statistics import Score, mean_score


@dataclass(frozen=True)
class Captioned:
    """The captions of a run, and what they are scored against."""

    captions: dict[str, str]
    references: dict[str, list[str]]
    idf: Literal["subset", "full"] = "subset"
    clip: ClipVectors | None = None
    """None where no CLIP metric is asked for, or where CLIP cannot run."""


def _clip(run: Captioned) -> dict[str, Score]:
    """CLIPScore and, where CLIP has encoded references, RefCLIPScore; an empty caption scores 0."""
    if run.clip is None:
        return {}
    scores = clip_scores(run.clip.photos, run.clip.captions)
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
    "diversity": lambda run: overlap.diversity(run.captions),
}
"""What scores a run: one score or several, by the names that scores.json has."""

LABELS = {
    "cider": "CIDEr-D", "clipscore": "CLIPScore", "refclipscore": "RefCLIPScore", "rouge": "ROUGE-L",
    "meteor": "METEOR", "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4",
    "length": "words a caption", "vocabulary": "different words", "distinct1": "distinct-1", "distinct2": "distinct-2",
    "unique": "different captions, share",
}  # fmt: skip
"""How tables and pages call the scores; one that is not here keeps its own name."""
