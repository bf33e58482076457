"""How sure a score is: bootstrap intervals over photos, and paired comparison of two runs on the same photos.

A corpus score is a function of sums over photos (a mean, or BLEU's clipped counts), so all resamples are one product
of a matrix of counts and the photos' parts. CIDEr's n-gram weights are not computed again for each resample: on 1,000
photos that makes no difference.
Efron 1979; paired tests as in Koehn 2004 (https://aclanthology.org/W04-3250) and Riezler and Maxwell 2005.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 2000


def ratio(sums: np.ndarray) -> np.ndarray:
    """(..., 2): the sum of the scores, and the number of photos that have one -> the mean; nan if no photo has one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Score:
    """One metric of one run."""

    corpus: float
    """The score of all photos."""
    photos: dict[str, float]
    """Scores by photo, without photos that could not be scored; empty for a figure of the corpus alone."""
    parts: dict[str, Sequence[float] | np.ndarray] = field(default_factory=dict)
    """C numbers by photo, the sums of which `of_sums` takes."""
    of_sums: Callable[[np.ndarray], np.ndarray] | None = ratio
    """(..., C) sums of parts -> (...) corpus scores; None where the corpus score is not a function of sums."""

    def matrix(self, stems: list[str]) -> np.ndarray:
        """(N, C) parts in the order of `stems`; a photo that could not be scored adds nothing to a mean."""
        return np.array([self.parts.get(stem, (0.0, 0.0)) for stem in stems])


def mean_score(photos: dict[str, float]) -> Score:
    """A metric whose corpus score is the mean over photos."""
    return Score(float(np.mean(list(photos.values()))), photos, {stem: (score, 1.0) for stem, score in photos.items()})


@functools.lru_cache(maxsize=2)  # every metric and run uses the same
def _counts(photos: int, seed: int) -> np.ndarray:
    """How often each photo is in each resample, (RESAMPLES, N)."""
    return np.random.default_rng(seed).multinomial(photos, np.full(photos, 1 / photos), RESAMPLES).astype(np.uint8)


@functools.lru_cache(maxsize=2)
def _signs(photos: int, seed: int) -> np.ndarray:
    """Which photos' two captions change sides in each permutation, (RESAMPLES, N) of 1 and -1."""
    return np.random.default_rng(seed).choice(np.array([1, -1], np.int8), (RESAMPLES, photos))


def _sums(draws: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(R, N) times (N, C); few rows at a time, because as floats they need eight times the memory."""
    pieces = np.array_split(draws, 1 + draws.size // 4_000_000)
    return np.concatenate([piece.astype(float) @ parts for piece in pieces])


def interval(score: Score, stems: list[str], seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the corpus score over photos."""
    values = score.of_sums(_sums(_counts(len(stems), seed), score.matrix(stems)))
    return tuple(np.nanpercentile(values, (2.5, 97.5)).tolist())


def paired(first: Score, second: Score, stems: list[str], seed: int = 0) -> dict[str, float]:
    """How `second` differs from `first` on the same photos.

    `difference` is the score of `second` minus that of `first`, `low` and `high` are the ends of its 95% interval, for
    which both runs are resampled by the same photos, and `p` is the two-sided p of a permutation test, which swaps the
    two captions of each photo at random.
    """
    one, two, value = first.matrix(stems), second.matrix(stems), first.of_sums
    counts = _counts(len(stems), seed)
    low, high = np.nanpercentile(value(_sums(counts, two)) - value(_sums(counts, one)), (2.5, 97.5)).tolist()
    observed = float(value(two.sum(axis=0)) - value(one.sum(axis=0)))
    middle, change = (one + two).sum(axis=0) / 2, _sums(_signs(len(stems), seed), (two - one) / 2)
    swapped = np.abs(value(middle + change) - value(middle - change))
    as_far = np.sum(swapped >= abs(observed) - 1e-12)  # the tolerance: sums in another order round differently
    return {"difference": observed, "low": low, "high": high, "p": float((1 + as_far) / (1 + RESAMPLES))}
