"""How much captions of one photo agree: CIDEr-D of each against the others, in numpy, without Java.

It chooses among captions that a model has drawn (minimum Bayes risk: Kumar and Byrne 2004; Eikema and Aziz 2020,
https://arxiv.org/abs/2005.10283), so that only their order matters. Scores that are reported come from metrics.cider.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty on unlike lengths, as in CIDEr-D
RARE = 5  # n-grams of fewer photos are not kept: they weigh nearly as much as unseen ones


@dataclass(frozen=True)
class Frequencies:
    """In how many photos' captions an n-gram occurs."""

    photos: int
    """How many photos there are."""
    counts: dict[str, int] = field(default_factory=dict)
    """Photos by n-gram, its words joined by spaces."""

    def weight(self, gram: str) -> float:
        """The n-gram's inverse document frequency."""
        return math.log(self.photos / max(1, self.counts.get(gram, 0)))


def words_of(caption: str) -> list[str]:
    """A caption's words in lower case without punctuation, nearly as the PTB tokenizer has them.

    >>> words_of("A man's T-shirt, red.")
    ['a', 'man', "'s", 't-shirt', 'red']
    """
    return re.findall(r"'?\w+(?:-\w+)*", caption.lower())


def grams_of(caption: str) -> Counter[str]:
    """How often each n-gram of 1 to 4 words stands in a caption."""
    words = words_of(caption)
    return Counter(" ".join(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def count_frequencies(captions: Iterable[Sequence[str]]) -> Frequencies:
    """The document frequencies of captions, each photo's being one document; rare n-grams are left out."""
    photos, counts = 0, Counter()
    for own in captions:
        photos += 1
        counts.update({gram for caption in own for gram in grams_of(caption)})
    return Frequencies(photos, {gram: count for gram, count in sorted(counts.items()) if count >= RARE})


def agreement(captions: Sequence[str], frequencies: Frequencies | None = None) -> np.ndarray:
    """(N) mean CIDEr-D of each of a photo's N captions against the other N - 1.

    Without `frequencies` all n-grams have the same weight.
    """
    grams = [grams_of(caption) for caption in captions]
    every = list(dict.fromkeys(gram for own in grams for gram in own))
    counts = np.array([[own[gram] for gram in every] for own in grams])
    vectors = counts * np.array([frequencies.weight(gram) if frequencies else 1.0 for gram in every])
    order = np.array([gram.count(" ") for gram in every])
    lengths = counts[:, order == 1].sum(axis=1)
    alike = np.exp(-((lengths[:, None] - lengths[None]) ** 2) / (2 * SIGMA**2))
    scores = np.zeros((len(grams), len(grams)))
    for n in range(LONGEST):
        own = vectors[:, order == n]
        norms = np.linalg.norm(own, axis=1)
        clipped = (np.minimum(own[:, None], own[None]) * own[None]).sum(axis=2)  # (caption, reference)
        both = norms[:, None] * norms[None]
        scores += np.divide(clipped, both, out=np.zeros_like(clipped), where=both > 0) * alike
    np.fill_diagonal(scores, 0.0)
    return 10 / LONGEST * scores.sum(axis=1) / max(1, len(grams) - 1)
