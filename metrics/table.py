"""The metrics that evaluate.py offers. To add one, write its function and add a line to METRICS."""

from collections.abc import Callable
from pathlib import Path

from data.instances import Instances
from metrics import overlap
from metrics.chair import chair
from metrics.cider import cider
from metrics.overlap import Predictions, References
from metrics.statistics import Score, mean_score

METRICS: dict[str, Callable[[References, Predictions, Instances | None], dict[str, Score]]] = {
    "cider": lambda references, captions, _: {"cider": mean_score(cider(references, captions)[1])},
    "bleu": lambda references, captions, _: overlap.bleu(references, captions),
    "rouge": lambda references, captions, _: {"rouge": overlap.rouge(references, captions)},
    "meteor": lambda references, captions, _: {"meteor": overlap.meteor(references, captions)},
    "spice": lambda references, captions, _: {"spice": overlap.spice(references, captions)},
    "chair": chair,
    "diversity": lambda _references, captions, _instances: overlap.diversity(captions),
}
"""What scores captions by their words: one score or several, by the names that scores.json has.

Each gets the references {photo: captions}, the captions {photo: caption} and, for CHAIR, the objects in the photos.
"""

_LINES = Path(__file__).with_name("scores.txt").read_text(encoding="utf-8").splitlines()
LABELS = {name: label for name, label, _ in (line.split(": ", 2) for line in _LINES)}
"""How tables and pages call the scores."""
MEANINGS = {name: meaning for name, _, meaning in (line.split(": ", 2) for line in _LINES)}
"""What each score means, in one line."""
