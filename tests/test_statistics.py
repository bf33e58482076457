"""Intervals that cover, tests whose p is uniform under no difference and small under a small one."""

import math

import numpy as np
import pytest

from demo import shapes
from metrics.cider import cider
from metrics.overlap import bleu, bleu_of_sums
from metrics.statistics import Score, interval, mean_score, paired

STEMS = [f"photo {i}" for i in range(100)]


def scores(values: np.ndarray) -> Score:
    return mean_score(dict(zip(STEMS, values.tolist())))


def test_intervals_cover_the_true_mean():
    """1,000 corpora of 100 skewed scores (gamma, mean 2): 95% intervals hold the mean in 93% to 97% of them."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = interval(scores(rng.gamma(4, 0.5, len(STEMS))), STEMS)
        covered += low <= 2 <= high
    assert 930 <= covered <= 970


def test_p_is_uniform_under_no_difference():
    """500 pairs of runs alike, correlated by photo: Kolmogorov and Smirnov's distance has a p above 0.01."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(500):
        photo = rng.gamma(2, 0.5, len(STEMS))
        one, two = (photo + rng.normal(0, 0.3, len(STEMS)) for _ in range(2))
        found.append(paired(scores(one), scores(two), STEMS)["p"])
    steps = np.arange(len(found) + 1) / len(found)
    distance = max(np.abs(np.sort(found) - steps[:-1]).max(), np.abs(np.sort(found) - steps[1:]).max())
    assert distance < 1.628 / math.sqrt(len(found))


def test_the_same_run_differs_by_nothing():
    one = scores(np.random.default_rng(0).random(len(STEMS)))
    assert paired(one, one, STEMS) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


@pytest.fixture(scope="module")
def captioned() -> tuple[dict, dict, dict]:
    """References and captions of 300 drawn scenes, and the same captions with 5% of them swapped."""
    references, captions = {}, {}
    for number in range(300):
        rng = np.random.default_rng(number)
        first, *others = shapes.write_captions(shapes.make_scene(rng), rng)
        references[f"scene {number}"], captions[f"scene {number}"] = others, first
    swapped = list(captions)[:15]
    return references, captions, captions | {a: captions[b] for a, b in zip(swapped, swapped[1:] + swapped[:1])}


def test_five_percent_of_swapped_captions_are_found(captioned):
    references, captions, swapped = captioned
    one, two = (mean_score(cider(references, run)[1]) for run in (captions, swapped))
    found = paired(one, two, list(captions))
    assert found["low"] < found["difference"] < found["high"] < 0 and found["p"] < 0.01
    # the paired interval is narrower than two intervals of their own would make it
    widths = [high - low for low, high in (interval(score, list(captions)) for score in (one, two))]
    assert found["high"] - found["low"] < 0.6 * math.hypot(*widths)
    for n, score in bleu(references, captions).items():
        assert paired(score, bleu(references, swapped)[n], list(captions))["p"] < 0.01


def test_bleu_of_sums_is_the_corpus_score(captioned):
    references, captions, _ = captioned
    for order, score in enumerate(bleu(references, captions).values(), start=1):
        whole = score.matrix(list(captions)).sum(axis=0)
        assert bleu_of_sums(whole, order) == pytest.approx(score.corpus, rel=1e-12)
        low, high = interval(score, list(captions))
        assert low < score.corpus < high
    assert bleu_of_sums(np.array([2, 4, 2, 1, 0, 0, 2, 1, 0, 0]), 1) == pytest.approx(math.exp(-1))  # short: brevity


def test_photos_without_a_score_are_left_out_of_means():
    some = mean_score({"photo 0": 1.0, "photo 1": 3.0})
    assert some.corpus == 2.0
    low, high = interval(some, STEMS[:3])
    assert low >= 1.0 and high <= 3.0
