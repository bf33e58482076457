"""From an attention record to one map for each word: the report's four methods, and methods that ground better.

All methods work on an `AttentionRecord`; nothing here runs a model. W units (words or tokens), P patches.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.forms import UNSPACED
from models.attention import AttentionRecord

BAND = (0.4, 0.6)  # of the depth: in middle layers words attend to what they name
SINK = 20.0  # a patch whose median over words is so many times the median patch's takes attention whatever the word


@dataclass(frozen=True)
class Unit:
    """A word, or a token, of a caption."""

    text: str
    tokens: tuple[int, ...]
    """Places of its tokens in the caption."""
    probability: float
    """Product of its tokens'."""
    image_mass: float
    """Share of attention, mean over heads, layers and tokens, that went to the photo's patches."""


def split_units(record: AttentionRecord, tokenizer, unit: str = "word") -> list[Unit]:
    """The words of a caption (sub-words joined, the closing EOS left out), or its tokens, EOS included.

    Byte-level tokenizers mark the start of a word by `Ġ`, SentencePiece by `▁`; punctuation stands alone.
    """
    groups: list[list[int]] = []
    if unit == "token":
        groups = [[place] for place in range(len(record.ids))]
    else:
        lone = False  # a mark alone belongs to the piece behind it
        for place, piece in enumerate(tokenizer.convert_ids_to_tokens(record.ids[:-1])):
            piece = piece or ""  # an id of the model that the tokenizer does not have
            bare = re.sub("^[Ġ▁Ċ]+", "", piece)
            goes_on = bare[:1].isalnum() or bare[:1] == "'" or ord(bare[:1] or " ") > 127
            last = tokenizer.decode([record.ids[one] for one in groups[-1]]) if groups else ""
            whole = UNSPACED.match(last[-1:])  # a word by itself, once all of its bytes are there
            if not groups or whole or not (lone or (bare == piece and goes_on)):
                groups.append([])
            groups[-1].append(place)
            lone = not bare
    mass = record.mean.sum(axis=2).mean(axis=0)  # (T)
    units = []
    for group in groups:
        text = tokenizer.decode([record.ids[place] for place in group]).strip()
        if text or unit == "token":
            probability = float(np.prod(record.probabilities[group]))
            units.append(Unit(text, tuple(group), probability, float(mass[group].mean())))
    return units


def joined(rows: np.ndarray, units: Sequence[Unit]) -> np.ndarray:
    """(..., T, P) maps of tokens -> (..., W, P): a word takes the maximum of its pieces, for a mean would blur it."""
    return np.stack([rows[..., list(unit.tokens), :].max(axis=-2) for unit in units], axis=-2)


def band(layers: int) -> slice:
    """The middle layers.

    >>> band(32), band(4), band(1)
    (slice(12, 20, None), slice(1, 3, None), slice(0, 1, None))
    """
    first = int(BAND[0] * layers)
    return slice(first, max(first + 1, int(np.ceil(BAND[1] * layers))))


def _mid(record: AttentionRecord, units: Sequence[Unit]) -> np.ndarray:
    return joined(record.mean[band(len(record.mean))], units).mean(axis=0)


def against_others(maps: np.ndarray) -> np.ndarray:
    """(W, P) attention -> what tells each word's share from that of the caption's other words, patch by patch.

    Sinks, patches that soak up attention whatever the word, hide what words differ in; they do not destroy it. With
    a the share of a patch among all patches and b its mean share for the other words, this is a log(a / b), the patch's
    part of the Kullback-Leibler divergence: nothing where a = b, and little where there is little attention. The
    strongest sinks, such as the first patch where no token stands before it, are levelled before.
    """
    share = maps / np.maximum(maps.sum(axis=1, keepdims=True), 1e-12)
    usual = np.median(share, axis=0)
    share[:, usual > SINK * np.median(usual)] = np.median(share, axis=1, keepdims=True)
    count = len(share)
    others = (share.sum(axis=0) - share) / (count - 1) if count > 1 else np.full_like(share, 1 / share.shape[1])
    level = max(float(np.median(others)), 1e-12)  # keeps the ratio of two near-nothings quiet
    return share * np.log((share + level) / (others + level))


def smoothed(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(W, P) -> (W, P) under a 3 x 3 binomial filter on the grid of patches."""
    padded = np.pad(maps.reshape(-1, *grid), ((0, 0), (1, 1), (1, 1)), mode="edge")
    for axis in (1, 2):
        parts = [np.take(padded, range(start, padded.shape[axis] - 2 + start), axis) for start in range(3)]
        padded = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return padded.reshape(len(maps), -1)


def _demeaned(maps: np.ndarray) -> np.ndarray:
    return maps - maps.mean(axis=0)


def _rel(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    return smoothed(against_others(joined(record.mean, units).mean(axis=0)), grid)


def _lens(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    return smoothed(_demeaned(joined(record.lens, units)), grid)


def _standardised(maps: np.ndarray) -> np.ndarray:
    """(W, P) -> (W, P), each map with mean 0 and standard deviation 1."""
    return (maps - maps.mean(axis=1, keepdims=True)) / np.maximum(maps.std(axis=1, keepdims=True), 1e-12)


class Method(NamedTuple):
    """A way to make maps of an attention record."""

    about: str
    """What it does, in a few words."""
    maps: Callable[[AttentionRecord, Sequence[Unit], tuple[int, int]], np.ndarray]
    """(record, units, grid) -> (W, P) maps; higher is more, and what is shown is their positive part."""


METHODS = {
    "last_mean": Method("last layer, mean over heads", lambda record, units, grid: joined(record.mean[-1], units)),
    "last_max": Method("last layer, maximum over heads", lambda record, units, grid: joined(record.peak[-1], units)),
    "penult_mean": Method(
        "last layer but one, mean over heads", lambda record, units, grid: joined(record.mean[-2:][0], units)
    ),
    "penult_max": Method(
        "last layer but one, maximum over heads", lambda record, units, grid: joined(record.peak[0], units)
    ),
    "mid": Method("middle layers, mean over heads", lambda record, units, grid: _mid(record, units)),
    "demean": Method(
        "middle layers, less the mean of all words", lambda record, units, grid: _demeaned(_mid(record, units))
    ),
    "rel": Method("all layers, compared with the caption's other words", _rel),
    "lens": Method("the word's logit at each patch, less the mean of all words", _lens),
    "fuse": Method(
        "`rel` and `lens` together",
        lambda record, units, grid: (
            _standardised(_rel(record, units, grid)) + _standardised(_lens(record, units, grid))
        ),
    ),
}
