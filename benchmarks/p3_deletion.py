"""Deletion and insertion curves of heatmaps: how likely is a word without what its map marks, or with nothing else?

    python -m benchmarks.p3_deletion --checkpoint RUN --images PHOTOS --instances FILE --output FOLDER

The settings are those of p3_visualize.py, and so are the captions; of each photo the first one is taken. A step paints
a part of the photo's patches in the photo's mean colour: the highest of the map (deletion), or all but these
(insertion). A score is the mean change of the word's log-probability over the steps, in nats, over all objects that
captions name. Lower is better for deletion, higher for insertion. The controls are P3's, but for random weights:
among them maps in random order, and from the centre outwards. FOLDER/deletion.json gets the scores. Petsiuk et al. 2018
(RISE, arXiv 1806.07421).

Pixels are painted, and not features replaced, because a patch's features also tell of the patches around it. Each map
of an object costs one pass over 6 photos.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
from PIL import Image

import p3_visualize as p3
from common.config import NothingDone, check, run
from common.files import write_json
from data.photos import LoadedPhoto
from metrics.grounding import GroundingTable
from metrics.statistics import Score, interval, ratio
from models.encoder import PatchGrid
from models.interface import CaptionModel

STEPS = (0.25, 0.5, 0.75)  # shares of the patches; the ends of a curve are the same for all maps


def painted(photo: LoadedPhoto, grid: PatchGrid, patches: np.ndarray) -> LoadedPhoto:
    """The photo with those of its patches (P) that are True in its mean colour."""
    left, top, right, bottom = (round(edge) for edge in grid.box)
    mask = Image.fromarray(255 * patches.reshape(grid.rows, grid.columns).astype(np.uint8))
    image, colour = photo.image.copy(), tuple(np.asarray(photo.image).mean(axis=(0, 1)).astype(int))
    image.paste(colour, (left, top), mask.resize((right - left, bottom - top), Image.Resampling.NEAREST))
    return replace(photo, image=image, key=f"{photo.key} {np.packbits(patches).tobytes().hex()}")


def curves(model: CaptionModel, look: p3.Look, tokens: list[int], values: np.ndarray) -> np.ndarray:
    """Deletion and insertion of a word's map (P); the word's `tokens` are places in its caption."""
    (photo, _, record, shown, _), rank = look, np.argsort(np.argsort(-values, kind="stable")) / len(values)
    photos = [painted(photo, shown.grid, (rank < share) == gone) for gone in (True, False) for share in STEPS]
    found = [record, *(one for (one,) in model.attend(photos, [[record.ids[:-1]]] * len(photos)))]
    whole, *logs = (np.log(one.probabilities[tokens] + 1e-30).sum() for one in found)
    return np.reshape(logs, (2, -1)).mean(axis=1) - whole


class Config(p3.Config):
    """The settings of p3_visualize.py; no picture is drawn."""


def main(cfg: Config) -> None:
    p3.check_settings(cfg)
    check(["instances: the curves are of words that name objects; expected instances"] * (cfg.instances is None))
    photos, _, instances = p3.read_inputs(cfg)
    model, table = p3.load_model(cfg, photos), GroundingTable(cfg.seed)
    parts, rows = defaultdict(lambda: defaultdict(float)), {}  # by curve and map, then by photo: sum, and objects
    for look in p3.look(model, [replace(one, captions=one.captions[:1]) for one in photos], instances, cfg):
        photo, _, _, shown, named = look
        controls = table.controls(shown.maps[cfg.method], named, (shown.grid.rows, shown.grid.columns))
        for name, maps in (shown.maps | controls).items():
            for one in named:
                tokens = [place for word in one.words for place in shown.units[word].tokens]
                changes = curves(model, look, tokens, maps[list(one.words)].mean(axis=0))
                for curve, change in zip(("deletion", "insertion"), changes):
                    parts[curve, name][photo.stem] += np.array([change, 1])
    if not parts:
        raise NothingDone("no caption names an object of its photo")
    for (curve, name), of_photos in parts.items():
        score, ends = ratio(sum(of_photos.values())), interval(Score(0, {}, of_photos), list(of_photos), cfg.seed)
        rows.setdefault(name, {})[curve] = {"score": float(score), "interval": ends}
        print(f"{curve:10}{name:26}{score:9.3f} [{ends[0]:.3f}, {ends[1]:.3f}]")
    write_json(cfg.output / "deletion.json", rows)


if __name__ == "__main__":
    run(main, Config)
