"""From an attention record to one map for each word: the report's four methods, and methods that ground better.

All methods work on an `AttentionRecord`; nothing here runs a model. W units (words), P patches.
docs/grounding.md says what each method is, where it comes from and what it costs.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from data.forms import UNSPACED
from models.attention import EXTRAS, AttentionRecord

BAND = (0.4, 0.6)  # of the depth: in middle layers words attend to what they name
HEADS = 3  # localization heads of a caption, as many as in the paper
SINK = 20.0  # a patch whose median over words is so many times the median patch's takes attention whatever the word


@dataclass(frozen=True)
class Unit:
    """A word of a caption."""

    text: str
    tokens: tuple[int, ...]
    """Places of its tokens in the caption."""
    probability: float
    """Product of its tokens'."""
    shares: np.ndarray
    """(L, 3) attention, mean over heads and tokens, to the photo, the caption so far and the first token, by layer."""


def split_units(record: AttentionRecord, tokenizer) -> list[Unit]:
    """The words of a caption, sub-words joined, the closing EOS left out.

    Byte-level tokenizers mark the start of a word by `Ġ`, SentencePiece by `▁`; punctuation stands alone.
    """
    groups: list[list[int]] = []
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
    units = []
    for group in groups:
        text = tokenizer.decode([record.ids[place] for place in group]).strip()
        if text:
            probability = float(np.prod(record.probabilities[group]))
            units.append(Unit(text, tuple(group), probability, record.shares[:, group].mean(axis=1)))
    return units


def joined(rows: np.ndarray, units: Sequence[Unit]) -> np.ndarray:
    """(..., T, P) maps of tokens -> (..., W, P): a word takes the maximum of its pieces, for a mean would blur it."""
    return np.stack([rows[..., list(unit.tokens), :].max(axis=-2) for unit in units], axis=-2)


def _mid(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    first, end = int(BAND[0] * len(record.mean)), int(np.ceil(BAND[1] * len(record.mean)))
    return joined(record.mean[first : max(first + 1, end)], units).mean(axis=0)  # one layer at least


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
    """(W, P) -> (W, P) under a 3 x 3 binomial filter on the grid of patches: two means of 2 x 2."""
    padded = torch.from_numpy(np.pad(maps.reshape(-1, *grid), ((0, 0), (1, 1), (1, 1)), mode="edge"))
    return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=1).reshape(maps.shape).numpy()


def _demeaned(maps: np.ndarray) -> np.ndarray:
    return maps - maps.mean(axis=0)


def _rel(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    return smoothed(against_others(joined(record.mean, units).mean(axis=0)), grid)


def _lens(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    return smoothed(_demeaned(joined(record.lens, units)), grid)


def _standardised(maps: np.ndarray) -> np.ndarray:
    """(W, P) -> (W, P), each map with mean 0 and standard deviation 1."""
    return (maps - maps.mean(axis=1, keepdims=True)) / np.maximum(maps.std(axis=1, keepdims=True), 1e-12)


def _fuse(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    return _standardised(_rel(record, units, grid)) + _standardised(_lens(record, units, grid))


def _tam(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    """Token activation map (Li et al. 2025): a token's logits less the part that the caption before it explains.

    That part is a mean of the earlier tokens' logits, weighted by how far each of them speaks for this token, and
    scaled by least squares. The same token, said before, explains nothing. The paper's prompt counts here as nothing.
    """
    logits = record.lens.clip(min=0)
    maps = logits.copy()
    for t, token in enumerate(record.ids[1:], start=1):
        weights = record.text[t, 1 : t + 1].clip(min=0) * (np.array(record.ids[:t]) != token)
        explained = weights @ logits[:t]
        scale = logits[t] @ explained / max(explained @ explained, 1e-12)
        maps[t] = (logits[t] - scale * explained).clip(min=0)
    return joined(smoothed(maps, grid), units)


def _heads(record: AttentionRecord, units: Sequence[Unit], grid: tuple[int, int]) -> np.ndarray:
    """Localization heads (Kang et al. 2025): of the heads that look at the photo, those whose maps are the sharpest.

    A head looks at the photo if its share of attention there is above the mean head's. Its maps are sharp if their
    entropy is low, on the mean of all words.
    """
    maps = joined(record.extra["heads"], units).reshape(-1, len(units), record.lens.shape[1])  # (L x H, W, P)
    mass = maps.sum(axis=(1, 2))
    looking = maps[mass >= mass.mean()]
    share = looking / np.maximum(looking.sum(axis=2, keepdims=True), 1e-12)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(axis=2)
    best = np.argsort(entropy.mean(axis=1), kind="stable")[:HEADS]
    return smoothed(looking[best].sum(axis=0), grid)


class Method(NamedTuple):
    """A way to make maps of an attention record."""

    kind: str
    """What it is made of."""
    about: str
    """What it does, in a few words."""
    maps: Callable[[AttentionRecord, Sequence[Unit], tuple[int, int]], np.ndarray]
    """(record, units, grid) -> (W, P) maps; higher is more, and what is shown is their positive part."""


def _of_tokens(rows: Callable[[AttentionRecord], np.ndarray]) -> Callable:
    """The maps of a method that takes (T, P) rows from the record as they are."""
    return lambda record, units, grid: joined(rows(record), units)


METHODS = {
    "last_mean": Method("attention", "last layer, mean over heads", _of_tokens(lambda record: record.mean[-1])),
    "last_max": Method("attention", "last layer, maximum over heads", _of_tokens(lambda record: record.peak[-1])),
    "penult_mean": Method("attention", "last layer but one, mean over heads", _of_tokens(lambda it: it.mean[-2:][0])),
    "penult_max": Method("attention", "last layer but one, maximum over heads", _of_tokens(lambda it: it.peak[0])),
    "mid": Method("attention", "middle layers, mean over heads", _mid),
    "demean": Method("attention", "middle layers, less the mean of all words", lambda *its: _demeaned(_mid(*its))),
    "rel": Method("attention", "all layers, compared with the caption's other words", _rel),
    "heads": Method("attention", "the three heads with the sharpest maps", _heads),
    "rollout": Method("attention", "attention times attention, all layers", _of_tokens(lambda it: it.extra["rollout"])),
    "gradcam": Method("gradient", "last layer's input x gradient", _of_tokens(lambda it: it.extra["gradcam"])),
    "relevancy": Method("gradient", "attention x gradient, all layers", _of_tokens(lambda it: it.extra["relevancy"])),
    "lens": Method("logit", "the word's logit at each patch, less the mean of all words", _lens),
    "tam": Method("logit", "the word's logit at each patch, less what the words before explain", _tam),
    "fuse": Method("attention and logit", "rel and lens together", _fuse),
}
CHEAP = tuple(name for name in METHODS if name not in EXTRAS)
