"""Do heatmaps ground words? Scores of a word's map against the mask of the object that it names, and controls.

Match@1 (headline)    a caption names K objects: does the map of a word fit its own object best? Chance is 1 / K.
PairWin               does an object's own word fit it better than another word? A map that ignores the word gets 0.5.
pointing              the pointing game (Zhang et al. 2016): is the maximum of the map on the object?
energy                energy-based pointing (Wang et al. 2020, Score-CAM): the share of the map that is on the object.
lift                  energy divided by the object's share of the area.
auroc                 chance that a patch on the object has a higher value than a patch off it.
obj_iou, f1_iou       as in TAM (Li et al. 2025): the overlap (intersection over union) of the object and the patches
                      above the map's threshold by Otsu; and the harmonic mean of that and of the share of patches that
                      the maps of the caption's function words leave below the mean of these thresholds.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metrics.object_words import phrases
from metrics.statistics import Score, interval, paired, ratio

METRICS = tuple("match_at_1 pair_win pointing energy lift auroc obj_iou f1_iou".split())
FUNCTION_WORDS = """a an the this that these those some any each every no all both another and or but nor he she it they
him her them his its their who whom whose which what where when there will would can could may might must""".split()


@dataclass(frozen=True)
class Named:
    """An object that a caption names."""

    name: str
    words: tuple[int, ...]
    """Indices of the words that name it."""
    cover: np.ndarray
    """(P) share of each patch that the object covers, from 0 to 1."""


def find_named(words: Sequence[str], covers: dict[str, np.ndarray]) -> list[Named]:
    """The objects of `covers` {object: (P) share of each patch} that the words name and the model saw, once each.

    >>> covers = dict.fromkeys(["dog", "red circle"], np.ones(4))
    >>> [(one.name, one.words) for one in find_named(["A", "red", "circle", "by", "2", "Dogs."], covers)]
    [('dog', (5,)), ('red circle', (1, 2))]
    """
    bare = [re.sub(r"^\W+|\W+$", "", word.lower()) for word in words]
    places: dict[str, list[tuple[int, ...]]] = {}
    for name in covers:
        for phrase in map(str.split, phrases(name)):
            for start in range(len(bare) - len(phrase) + 1):
                if bare[start : start + len(phrase)] == phrase:
                    places.setdefault(name, []).append(tuple(range(start, start + len(phrase))))
    return [Named(name, min(of_object), covers[name]) for name, of_object in places.items() if covers[name].any()]


def cover_on_grid(mask: np.ndarray, box: tuple[float, float, float, float], grid: tuple[int, int]) -> np.ndarray:
    """(H, W) mask of a photo -> (P) share of each patch that the mask covers.

    `grid` (rows, columns) divides `box` (left, top, right, bottom), in pixels of the photo, into patches. What lies
    outside the photo counts as not covered.
    """
    left, top, right, bottom = box
    rows = _shares(np.linspace(top, bottom, grid[0] + 1), mask.shape[0])
    columns = _shares(np.linspace(left, right, grid[1] + 1), mask.shape[1])
    patch_area = (right - left) * (bottom - top) / (grid[0] * grid[1])
    return (rows @ mask.astype(float) @ columns.T / patch_area).clip(0, 1).reshape(-1)


def _shares(edges: np.ndarray, pixels: int) -> np.ndarray:
    """Share of each pixel of a line that lies between edges n and n + 1: (number of edges - 1, pixels)."""
    starts = np.arange(pixels)
    return (np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)).clip(min=0)


def auroc(values: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a patch on the object has a higher value than one off it; ties count half.

    `values`, and how far each patch is on (`positive`) and off (`negative`) the object: (P) each.
    """
    order = np.argsort(values, kind="stable")
    values, positive, negative = values[order], positive[order], negative[order]
    starts = np.flatnonzero(np.r_[True, np.diff(values) > 0])
    on, off = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    below = np.r_[0.0, off.cumsum()[:-1]]
    return float((on * (below + off / 2)).sum() / max(on.sum() * off.sum(), 1e-12))


def otsu(values: np.ndarray) -> float:
    """The threshold that parts the values into two groups with the largest variance between them (Otsu 1979).

    >>> otsu(np.array([5.0, 0, 1, 6, 0.5]))
    1.0
    """
    ordered, below = np.sort(values), np.arange(1, len(values))
    lower = ordered.cumsum()[:-1] / below
    upper = (ordered.sum() - ordered.cumsum()[:-1]) / below[::-1]
    return float(ordered[np.argmax(below * below[::-1] * (upper - lower) ** 2)])


def ground(maps: np.ndarray, named: Sequence[Named], words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """(W, P) maps of a caption's W words and the objects it names -> {metric: (sum over objects, number of them)}.

    The map of an object is the mean of its words' maps. f1_iou has the same again for the function words.
    """
    object_maps = np.stack([maps[list(one.words)].mean(axis=0) for one in named])
    covers = np.stack([one.cover for one in named])
    idle = [i for i, word in enumerate(words) if word.lower() in FUNCTION_WORDS]
    found = _compare_objects(object_maps, covers) | _score_each(object_maps, covers)
    return found | _overlap(object_maps.clip(min=0), covers, maps[idle])


def _overlap(maps: np.ndarray, covers: np.ndarray, idle: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Obj-IoU and F1-IoU of (K, P) maps and masks of objects, and the maps of the function words."""
    thresholds = np.array([otsu(values) for values in maps])
    chosen = maps > thresholds[:, None]
    overlap = float(((chosen * covers).sum(axis=1) / np.maximum(chosen, covers).sum(axis=1)).sum())
    quiet = float((idle <= thresholds.mean()).mean(axis=1).sum())
    return {"obj_iou": (overlap, len(maps)), "f1_iou": (overlap, len(maps), quiet, len(idle))}


def harmonic(sums: np.ndarray) -> np.ndarray:
    """(..., 4) sums and numbers of two scores -> the harmonic mean of the two means."""
    first, second = ratio(sums[..., :2]), ratio(sums[..., 2:])
    return 2 * first * second / np.maximum(first + second, 1e-12)  # of 0 and 0 it is 0


def _compare_objects(maps: np.ndarray, covers: np.ndarray) -> dict[str, tuple[float, float]]:
    """Match@1 and PairWin of (K, P) maps and masks of objects.

    Patches that two objects share are ignored, and so are objects that have no patch of their own.
    """
    shared = np.stack([np.delete(covers, i, axis=0).max(axis=0, initial=0.0) for i in range(len(covers))])
    on, off = (covers - shared).clip(min=0), 1 - covers
    apart = [j for j in range(len(covers)) if on[j].sum() > 0.01 and off[j].sum() > 0.01]
    if len(apart) < 2:
        return {}
    fit = np.array([[auroc(maps[i], on[j], off[j]) for j in apart] for i in apart])  # map i, mask j
    best = fit == fit.max(axis=1, keepdims=True)
    matched = best.diagonal() / best.sum(axis=1)
    wins = (fit.diagonal() > fit) + 0.5 * (fit.diagonal() == fit)  # own map j against map i, on mask j
    others = ~np.eye(len(apart), dtype=bool)
    return {
        "match_at_1": (float(matched.sum()), len(apart)),
        "pair_win": (float(wins[others].sum()), int(others.sum())),
    }


def _score_each(maps: np.ndarray, covers: np.ndarray) -> dict[str, tuple[float, float]]:
    """Pointing, energy, lift and AUROC of (K, P) maps and masks of objects."""
    sums = np.zeros(4)
    for values, cover in zip(maps, covers):
        top, positive = values == values.max(), values.clip(min=0)
        energy = (positive * cover).sum() / positive.sum() if positive.any() else cover.mean()
        pointing = (cover[top] >= cover.max() / 2).mean()  # a small object covers no patch fully
        sums += pointing, energy, energy / cover.mean(), auroc(values, cover, 1 - cover)
    return {metric: (total, len(maps)) for metric, total in zip(("pointing", "energy", "lift", "auroc"), sums)}


# ------------------------------------------------------------------------------------------- the table


class GroundingTable:
    """Scores of methods and controls, one row each; captions are added one by one, intervals are over photos."""

    def __init__(self, seed: int = 0):
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.parts: dict[str, dict[str, dict[str, np.ndarray]]] = {}  # row -> metric -> photo -> (sum, count)

    def add(self, photo: str, rows: dict[str, np.ndarray], named: Sequence[Named], words: Sequence[str]) -> None:
        """Add the scores of one caption: its maps (W, P) by row, the objects that it names and its W words."""
        for row, maps in rows.items():
            found, parts = ground(maps, named, words), self.parts.setdefault(row, {metric: {} for metric in METRICS})
            for metric in METRICS:
                parts[metric][photo] = parts[metric].get(photo, 0) + np.array(found.get(metric, (0, 0)))

    def controls(self, maps: np.ndarray, named: list[Named], grid: tuple[int, int]) -> dict[str, np.ndarray]:
        """Maps (W, P) that do not depend on the word or the photo, and as the upper limit the true masks.

        `grid` is (rows, columns) of the patches.
        """
        y, x = (np.linspace(-1, 1, size) for size in grid)
        centre = np.exp(-(y[:, None] ** 2 + x[None, :] ** 2)).reshape(-1)  # rises towards the middle of the grid
        truth = np.zeros_like(maps)
        for one in named:
            truth[list(one.words)] = one.cover
        return {
            "random maps": self.rng.random(maps.shape),
            "centre": np.tile(centre, (len(maps), 1)),
            "caption mean": np.tile(maps.mean(axis=0), (len(maps), 1)),
            "shuffled words": maps[self.rng.permutation(len(maps))],
            "ground truth on the grid": truth,
        }

    def scores(self) -> dict[str, dict[str, Score]]:
        """Each row's metrics, as means over objects."""
        return {
            row: {metric: _over_photos(of_photos) for metric, of_photos in by_metric.items()}
            for row, by_metric in self.parts.items()
        }

    def summary(self, method: str) -> tuple[dict, str]:
        """All rows with intervals, and `method` less two of them: as plain values, and as a table to read."""
        scores, rows, differences = self.scores(), {}, {}
        lines = [f"{'':28}" + "".join(f"{metric:>25}" for metric in METRICS)]
        for row, by_metric in scores.items():
            rows[row] = {metric: self._with_interval(score) for metric, score in by_metric.items()}
            mark = " *" if row == method else ""
            lines.append(f"{row + mark:28}" + "".join(f"{_to_text(**cell):>25}" for cell in rows[row].values()))
        for other, metric in itertools.product(("last_mean", "centre"), ("match_at_1", "pair_win", "pointing")):
            if other in scores and other != method and scores[other][metric].photos:
                first, second = scores[other][metric], scores[method][metric]
                change = paired(first, second, list(first.parts), self.seed)
                differences.setdefault(f"less_{other}", {})[metric] = change
                values = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]  p {p:.4f}".format_map(change)
                lines.append(f"{metric}, {method} less {other}: {values}")
        parts = self.parts[method]
        objects, among_others = (int(sum(parts[name].values())[1]) for name in ("pointing", "match_at_1"))
        counts = {"photos": len(parts["pointing"]), "objects": objects, "objects_among_others": among_others}
        named = f"{objects} objects named in {counts['photos']} photos"
        lines.append(f"{named}, {among_others} of them in captions that name two or more")
        return {"method": method, **counts, "rows": rows, **differences}, "\n".join(lines)

    def _with_interval(self, score: Score) -> dict:
        ends = interval(score, list(score.parts), self.seed) if score.photos else None
        return {"score": score.corpus if score.photos else None, "interval": ends}


def _over_photos(parts: dict[str, np.ndarray]) -> Score:
    """The metric's score from each photo's sums and numbers of objects."""
    sums = np.array(list(parts.values()))
    of_sums = ratio if sums.shape[1] == 2 else harmonic
    photos = {stem: float(value) for stem, value in zip(parts, of_sums(sums)) if not np.isnan(value)}
    return Score(float(of_sums(sums.sum(axis=0))), photos, parts, of_sums)


def _to_text(score: float | None, interval: tuple[float, float] | None) -> str:
    return "none" if interval is None else f"{score:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
