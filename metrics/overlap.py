"""BLEU, ROUGE-L and METEOR as pycocoevalcap computes them on PTB tokens, and how varied the captions are.

All take references {photo: captions} and predictions {photo: caption}, raw text; scores are fractions from 0 to 1.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from metrics.cider import find_java, ptb_tokenize, tokenize_pairs
from metrics.statistics import Score, mean_score

References, Predictions = dict[str, list[str]], dict[str, str]


def _tokens(references: References, predictions: Predictions) -> tuple[References, References]:
    return tokenize_pairs({photo: references[photo] for photo in predictions}, predictions)


def bleu_of_sums(sums: np.ndarray, order: int) -> np.ndarray:
    """(..., 10) summed lengths of captions and references, n-grams (1 to 4), matched ones -> BLEU of `order`."""
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's guards against zeros
    length, reference, guessed, matched = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    precision = ((matched + tiny) / (guessed + small))[..., :order].prod(axis=-1) ** (1 / order)
    brevity = (length + tiny) / (reference + small)
    return precision * np.where(brevity < 1, np.exp(1 - 1 / np.minimum(brevity, 1)), 1.0)


def bleu(references: References, predictions: Predictions) -> dict[str, Score]:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al. 2002), reference of the closest length, as `bleu1`, ..."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    gold, hypotheses = _tokens(references, predictions)
    scorer = BleuScorer(n=4)
    for photo in predictions:
        scorer += (hypotheses[photo][0], gold[photo])
    corpus, by_photo = scorer.compute_score(option="closest")
    parts = {}
    for photo, counts in zip(predictions, scorer.ctest):
        length = counts["testlen"]
        closest = min((abs(other - length), other) for other in counts["reflen"])[1]
        parts[photo] = (length, closest, *counts["guess"], *counts["correct"])
    return {
        f"bleu{n}": Score(
            corpus[n - 1], dict(zip(predictions, by_photo[n - 1])), parts, functools.partial(bleu_of_sums, order=n)
        )
        for n in (1, 2, 3, 4)
    }


def rouge(references: References, predictions: Predictions) -> Score:
    """ROUGE-L (Lin 2004), the mean over photos."""
    from pycocoevalcap.rouge.rouge import Rouge

    _, scores = Rouge().compute_score(*_tokens(references, predictions))
    return mean_score(dict(zip(predictions, scores.tolist())))


class MeteorUnavailable(Exception):
    """METEOR's Java program does not run here; the message is one line that says why."""


@contextmanager
def _meteor_can_run() -> Iterator[None]:
    """The environment that its jar needs: Java on PATH, numbers with points, and one collector's worth of memory."""
    options = "-Duser.language=en -Duser.country=US -XX:+UseSerialGC"
    path = f"{Path(find_java()).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    before = dict(os.environ)
    os.environ.update(PATH=path, JDK_JAVA_OPTIONS=options)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def meteor(references: References, predictions: Predictions) -> Score:
    """METEOR 1.5 (Denkowski and Lavie 2014), by its own Java program: 2 GB of heap at most, some seconds to load.

    The corpus score is the program's own, of statistics that it keeps to itself, so it has no interval. Raises
    MeteorUnavailable.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    gold, hypotheses = _tokens(references, predictions)
    with _meteor_can_run():
        program = Meteor()
    try:
        corpus, by_photo = program.compute_score(gold, hypotheses)
    except BaseException as error:
        program.lock = threading.Lock()  # the old one is held still, and its destructor would wait for it for ever
        program.meteor_p.kill()
        if not isinstance(error, (OSError, ValueError)):  # a broken pipe, or no number: the reason is in its stderr
            raise
        said = program.meteor_p.stderr.read().decode(errors="replace").splitlines()
        reasons = [line for line in said if line.strip() and not line.startswith("NOTE: Picked up")]
        raise MeteorUnavailable(reasons[0] if reasons else str(error)) from None
    return Score(corpus, dict(zip(predictions, by_photo)), of_sums=None)


DIVERSITY: dict[str, Callable[[list[list[str]]], float]] = {
    "length": lambda captions: float(np.mean([len(words) for words in captions])),
    "vocabulary": lambda captions: len({word for words in captions for word in words}),
    "distinct1": lambda captions: _distinct(captions, 1),
    "distinct2": lambda captions: _distinct(captions, 2),
    "unique": lambda captions: len({tuple(words) for words in captions}) / len(captions),
}
"""Words a caption, different words, different n-grams in all n-grams (Li et al. 2016), different captions in all."""


def _distinct(captions: list[list[str]], n: int) -> float:
    grams = [tuple(words[i : i + n]) for words in captions for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def diversity(predictions: Predictions) -> dict[str, float]:
    """How varied the captions are, empty ones left aside, on PTB tokens: the figures of DIVERSITY by name."""
    tokens = ptb_tokenize({photo: [caption] for photo, caption in predictions.items()})
    captions = [text.split() for (text,) in tokens.values() if text] or [[]]
    return {name: float(measure(captions)) for name, measure in DIVERSITY.items()}
