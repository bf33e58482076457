"""Do heatmaps ground words? A word's map against the masks of what it names, with controls that show what is luck.

Match@1 (headline): of the objects that a caption names, is the word's map best for its own? Chance is 1 / K.
PairWin: is an object's mask better met by its own word's map than by another word's? Any map that ignores the word
gets exactly one half. Pointing game (Zhang et al. 2016): does the maximum lie on the object? Energy-based pointing
(Wang et al. 2020, Score-CAM): the share of the map that does; its lift is that over the object's share of the area.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.statistics import Score, interval, paired

METRICS = ("match_at_1", "pair_win", "pointing", "energy", "lift", "auroc")


@dataclass(frozen=True)
class Named:
    """An object that a caption names: the places of its words among the units, and its mask on the patch grid."""

    name: str
    words: tuple[int, ...]
    cover: np.ndarray
    """(P) share of each patch that the object covers, from 0 to 1."""


def find_named(words: Sequence[str], names: dict[str, Iterable[str]]) -> list[tuple[str, tuple[int, ...]]]:
    """(object, places of its words) for each object of `names` {object: phrases} that the words name, once each.

    >>> find_named(["A", "red", "circle", "by", "2", "Dogs."], {"dog": ["dog", "dogs"], "red circle": ["red circle"]})
    [('dog', (5,)), ('red circle', (1, 2))]
    """
    bare = [re.sub(r"^\W+|\W+$", "", word.lower()) for word in words]
    found = []
    for name, phrases in names.items():
        places = (
            tuple(range(start, start + len(phrase)))
            for phrase in map(str.split, phrases)
            for start in range(len(bare) - len(phrase) + 1)
            if bare[start : start + len(phrase)] == phrase
        )
        first = min(places, default=None)
        if first is not None:
            found.append((name, first))
    return found


def cover_on_grid(mask: np.ndarray, box: tuple[float, float, float, float], grid: tuple[int, int]) -> np.ndarray:
    """(H, W) mask of a photo -> (P) covered share of each patch; `box` (left, top, right, bottom) is cut into `grid`.

    What lies outside the photo counts as not covered.
    """
    height, width = mask.shape
    total = np.pad(mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    left, top, right, bottom = box

    def area(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Covered pixels above and left of (y, x), between pixels by the line between them."""
        y, x = np.clip(y, 0, height)[:, None], np.clip(x, 0, width)[None, :]
        y0, x0 = np.minimum(y.astype(int), height - 1), np.minimum(x.astype(int), width - 1)
        dy, dx = y - y0, x - x0
        upper = total[y0, x0] * (1 - dx) + total[y0, x0 + 1] * dx
        lower = total[y0 + 1, x0] * (1 - dx) + total[y0 + 1, x0 + 1] * dx
        return upper * (1 - dy) + lower * dy

    corners = area(np.linspace(top, bottom, grid[0] + 1), np.linspace(left, right, grid[1] + 1))
    covered = np.diff(np.diff(corners, axis=0), axis=1)
    patch = (right - left) * (bottom - top) / (grid[0] * grid[1])
    return (covered / patch).clip(0, 1).reshape(-1)


def auroc(values: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a patch on the object has a higher value than one off it, ties half; (P) values and weights."""
    order = np.argsort(values, kind="stable")
    values, positive, negative = values[order], positive[order], negative[order]
    starts = np.flatnonzero(np.r_[True, np.diff(values) > 0])
    on, off = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    below = np.r_[0.0, off.cumsum()[:-1]]
    return float((on * (below + off / 2)).sum() / max(on.sum() * off.sum(), 1e-12))


def ground(maps: np.ndarray, named: Sequence[Named]) -> dict[str, tuple[float, float]]:
    """(W, P) maps of a caption's words against what it names: {metric: (sum over objects, number of them)}.

    An object's map is the mean of its words'. Patches that two of the objects share count for neither in Match@1 and
    PairWin, and an object that has no patch of its own takes no part in them.
    """
    own = np.stack([maps[list(one.words)].mean(axis=0) for one in named])
    covers = np.stack([one.cover for one in named])
    shared = np.stack([np.delete(covers, i, axis=0).max(axis=0, initial=0.0) for i in range(len(named))])
    on, off = (covers - shared).clip(min=0), 1 - covers
    found = {}
    apart = [j for j in range(len(named)) if on[j].sum() > 0.01 and off[j].sum() > 0.01]  # has patches of its own
    if len(apart) > 1:
        fit = np.array([[auroc(own[i], on[j], off[j]) for j in apart] for i in apart])  # map i, mask j
        best = fit == fit.max(axis=1, keepdims=True)
        found["match_at_1"] = float((best.diagonal() / best.sum(axis=1)).sum()), len(apart)
        rivals = ~np.eye(len(apart), dtype=bool)
        wins = (fit.diagonal()[None, :] > fit) + 0.5 * (fit.diagonal()[None, :] == fit)
        found["pair_win"] = float(wins[rivals].sum()), int(rivals.sum())
    positive = own.clip(min=0)
    energy, area = [], covers.mean(axis=1)
    hits = []
    for row, cover, plus in zip(own, covers, positive):
        top = row == row.max()
        hits.append((cover[top] >= cover.max() / 2).mean())  # a small object fills no patch
        energy.append((plus * cover).sum() / plus.sum() if plus.sum() > 0 else cover.mean())
    found["pointing"] = float(sum(hits)), len(named)
    found["energy"] = float(sum(energy)), len(named)
    found["lift"] = float((np.array(energy) / area).sum()), len(named)
    areas = [auroc(row, cover, 1 - cover) for row, cover in zip(own, covers)]
    found["auroc"] = float(sum(areas)), len(named)
    return found


# ------------------------------------------------------------------------------------------- controls


def centre(grid: tuple[int, int]) -> np.ndarray:
    """(P) higher towards the middle of the grid."""
    y, x = (np.linspace(-1, 1, size) for size in grid)
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2)).reshape(-1)


Control = Callable[[np.ndarray, Sequence[Named], tuple[int, int], np.random.Generator], np.ndarray]
CONTROLS: dict[str, Control] = {
    "random maps": lambda maps, named, grid, rng: rng.random(maps.shape),
    "centre": lambda maps, named, grid, rng: np.tile(centre(grid), (len(maps), 1)),
    "caption mean": lambda maps, named, grid, rng: np.tile(maps.mean(axis=0), (len(maps), 1)),
    "shuffled words": lambda maps, named, grid, rng: maps[rng.permutation(len(maps))],
    "ground truth on the grid": lambda maps, named, grid, rng: _truth(maps, named),
}
"""What maps that know less, or all, score: (maps, named, grid, generator) -> (W, P)."""


def _truth(maps: np.ndarray, named: Sequence[Named]) -> np.ndarray:
    truth = np.zeros_like(maps)
    for one in named:
        truth[list(one.words)] = one.cover
    return truth


# ------------------------------------------------------------------------------------------- the table


class GroundingTable:
    """Scores of methods and controls as captions come, a row each; intervals are over photos."""

    def __init__(self, seed: int = 0):
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.found: dict[str, dict[str, dict[str, np.ndarray]]] = {}  # row -> photo -> metric -> (sum, count)

    def add(self, row: str, photo: str, maps: np.ndarray, named: Sequence[Named]) -> None:
        """One caption's (W, P) maps by one method."""
        sums = self.found.setdefault(row, {}).setdefault(photo, {metric: np.zeros(2) for metric in METRICS})
        for metric, parts in ground(maps, named).items():
            sums[metric] += parts

    def add_controls(self, photo: str, maps: np.ndarray, named: Sequence[Named], grid: tuple[int, int]) -> None:
        for name, control in CONTROLS.items():
            self.add(name, photo, control(maps, named, grid, self.rng), named)

    def scores(self) -> dict[str, dict[str, Score]]:
        """Each row's metrics, as means over objects."""
        return {
            row: {metric: _score({photo: sums[metric] for photo, sums in found.items()}) for metric in METRICS}
            for row, found in self.found.items()
        }

    def summary(self, method: str, against: str = "last_mean") -> tuple[dict, str]:
        """All rows with intervals, and `method` compared with `against`: as plain values, and as a table to read."""
        scores, rows, lines = self.scores(), {}, [f"{'':28}" + "".join(f"{metric:>25}" for metric in METRICS)]
        for row, own in scores.items():
            rows[row], line = {}, f"{row + (' *' if row == method else ''):28}"
            for metric, score in own.items():
                if not score.photos:
                    rows[row][metric], line = {"score": None, "interval": None}, line + "none".rjust(25)
                    continue
                low, high = interval(score, list(score.parts), self.seed)
                rows[row][metric] = {"score": score.corpus, "interval": [low, high]}
                line += f"{score.corpus:.3f} [{low:.3f}, {high:.3f}]".rjust(25)
            lines.append(line)
        changes = {}
        if method != against:
            for metric in ("match_at_1", "pair_win", "pointing"):
                first, second = scores[against][metric], scores[method][metric]
                if not first.photos:
                    continue
                change = changes[metric] = paired(first, second, list(first.parts), self.seed)._asdict()
                lines.append(
                    f"{metric}, {method} less {against}: {change['difference']:+.3f} "
                    f"[{change['low']:+.3f}, {change['high']:+.3f}]  p {change['p']:.4f}"
                )
        counts = {
            name: int(sum(count for _, count in scores[method][metric].parts.values()))
            for name, metric in (("objects", "pointing"), ("objects_among_others", "match_at_1"))
        }
        counts = {"photos": len(self.found[method])} | counts
        lines.append(
            f"{counts['objects']} objects named in {counts['photos']} photos, {counts['objects_among_others']} of them "
            "in captions that name two or more"
        )
        return {"method": method, **counts, "rows": rows, f"less_{against}": changes}, "\n".join(lines)


def _score(parts: dict[str, np.ndarray]) -> Score:
    total, count = np.array(list(parts.values())).sum(axis=0)
    photos = {photo: float(top / bottom) for photo, (top, bottom) in parts.items() if bottom}
    return Score(float(total / count) if count else float("nan"), photos, {k: tuple(v) for k, v in parts.items()})
