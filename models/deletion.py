"""Deletion and insertion: how likely is a word when what its map marks is taken from the photo, or is all there is?

Petsiuk et al. 2018 (RISE, https://arxiv.org/abs/1806.07421), here of a word's log-probability in a given caption.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from data.photos import LoadedPhoto
from models.attention import AttentionRecord
from models.encoder import PatchGrid
from models.interface import CaptionModel

STEPS = 4  # parts of the photo that go, or come, one after the other


def deletion_insertion(
    model: CaptionModel, photo: LoadedPhoto, record: AttentionRecord, grid: PatchGrid, words: Sequence[list[int]],
    maps: np.ndarray,
) -> dict[str, tuple[float, int]]:  # fmt: skip
    """{deletion, insertion: (sum over W words, W)} of maps (W, P); words are places in the caption of `record`.

    Deletion paints patches in the order of the map, the highest first, in the photo's mean colour. The lower its area,
    the more the map marks what the word needs. Insertion uncovers them in that order: the higher, the better. An area
    is the mean of the curve's inner points, in nats above the word's log-probability in the whole photo: the ends of a
    curve are the same for all maps. One batch of 2 (STEPS - 1) photos is read for each word. Pixels are painted, and
    not features replaced, because a patch's features also tell of the patches around it.
    """
    sums = np.zeros(2)
    for places, values in zip(words, maps):
        rank = np.argsort(np.argsort(-values, kind="stable")) / len(values)
        first = [rank < step / STEPS for step in range(1, STEPS)]
        photos = [_painted(photo, grid, patches) for patches in (*first, *np.logical_not(first))]
        found = [one for (one,) in model.attend(photos, [[record.ids[:-1]]] * len(photos))]
        logs = [np.log(one.probabilities[places] + 1e-30).sum() for one in (record, *found)]
        sums += np.reshape(logs[1:], (2, -1)).mean(axis=1) - logs[0]
    return {curve: (total, len(words)) for curve, total in zip(("deletion", "insertion"), sums)}


def _painted(photo: LoadedPhoto, grid: PatchGrid, patches: np.ndarray) -> LoadedPhoto:
    """The photo with some of its patches (P) in its mean colour."""
    left, top, right, bottom = (round(edge) for edge in grid.box)
    mask = Image.fromarray(255 * patches.reshape(grid.rows, grid.columns).astype(np.uint8))
    image, colour = photo.image.copy(), tuple(np.asarray(photo.image).mean(axis=(0, 1)).astype(int))
    image.paste(colour, (left, top), mask.resize((right - left, bottom - top), Image.Resampling.NEAREST))
    return replace(photo, image=image, key=f"{photo.key} {patches.tobytes().hex()}")
