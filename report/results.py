"""Figures and findings of the report, computed from what the steps have made."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.config import flatten
from common.files import JsonLines
from data.predictions import read_predictions
from metrics.cider import agreement
from report.steps import DECODINGS, MORE_SEEDS, Setting


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of a training run by dotted name."""
    return flatten(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))


def score_of(run: dict, metric: str) -> dict[str, Any]:
    """A run's score and its interval; None where there is none."""
    return {"score": run["corpus"].get(metric), "interval": run["intervals"].get(metric)}


def read_heatmaps(folder: Path) -> dict[str, Any]:
    """What a page of p3_visualize.py holds: colours, and the photos with words and maps."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def likeness(photos: list[dict]) -> dict[str, float]:
    """How alike the maps of one caption's words are, by method: the mean correlation of two maps, over photos.

    1: all words of a caption have the same map. The maps are as they are shown, negative values as 0.
    """
    found: dict[str, list[float]] = {}
    for photo in (photo for photo in photos if len(photo["words"]) > 1):
        pairs = np.triu_indices(len(photo["words"]), k=1)
        for method, text in photo["maps"].items():
            maps = np.frombuffer(base64.b64decode(text), np.uint8).reshape(len(photo["words"]), -1).astype(float)
            with np.errstate(invalid="ignore", divide="ignore"):  # an empty map correlates with nothing
                found.setdefault(method, []).append(float(np.nanmean(np.corrcoef(maps)[pairs])))
    return {method: float(np.nanmean(values)) for method, values in found.items()}


def self_cider(s: Setting) -> dict[str, float]:
    """By decoding: CIDEr-D of a caption of a photo against captions of the same photo by other seeds.

    As self-BLEU (Zhu et al. 2018, https://arxiv.org/abs/1802.01886): 10 if all are alike, and the lower, the more
    diverse. It is not the measure of the same name by Wang and Chan (2019), which takes eigenvalues.
    """
    found = {}
    for name in DECODINGS:
        others = [s.work / f"again_{seed}.{name}.json" for seed in MORE_SEEDS]
        runs = [read_predictions(path) for path in others if path.exists()]
        first = read_predictions(s.work / f"llava.{name}.json")
        stems = list(runs[0] if runs else read_predictions(s.work / f"again_{MORE_SEEDS[0]}.moderate.json"))
        drawn = {stem: [first[stem], *(run[stem] for run in runs or [first] * len(others))] for stem in stems}
        found[name] = float(np.mean([score for scores in agreement(drawn).values() for score in scores]))
    return found


def losses(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Training loss, validation loss and learning rate of a run by optimizer step, of both stages in a row."""
    curves: dict[str, list] = {"training": [], "validation": [], "learning rate": []}
    before, step = 0, 0  # steps are counted within an epoch
    for row in JsonLines(run / "metrics.jsonl").rows():
        if "step" in row:
            step = before + row["step"]
            curves["training"].append((step, row["loss"]))
            curves["learning rate"].append((step, row["lr"]))
        else:
            before = step
            curves["validation"] += [(step, row["val_loss"])] if "val_loss" in row else []
    return curves


# ------------------------------------------------------------------------------------------- findings


def side(change: dict[str, float]) -> int:
    """1 or -1 where the interval of a difference lies above or below zero, 0 where it holds zero."""
    return (change["low"] > 0) - (change["high"] < 0)


def finding(metric: str, name: str, against: str, changes: list[dict[str, float]]) -> str:
    """A sentence on the difference of `name` from `against`, measured once for each seed.

    >>> finding("CIDEr-D", "diverse", "best", [{"difference": -0.5, "low": -0.7, "high": -0.4}])
    'CIDEr-D is lower with diverse than with best: -0.500 [-0.700, -0.400].'
    """
    sides = {side(change) for change in changes}
    numbers = "; ".join(map("{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format_map, changes))
    seeds = f" with each of {len(changes)} seeds" if len(changes) > 1 else ""
    if len(sides) > 1:
        return f"{metric} does not tell {name} from {against}, since the seeds do not agree: {numbers}."
    if sides == {0}:
        zero = f"{seeds}, the interval of the difference holds zero" if seeds else " the interval holds zero"
        return f"{metric} does not tell {name} from {against}:{zero}: {numbers}."
    return f"{metric} is {'higher' if sides == {1} else 'lower'} with {name} than with {against}{seeds}: {numbers}."


def six_figures(s: Setting) -> dict[str, float]:
    """The figures that matter most."""
    runs, own = read(s.work / "scores.json")["runs"], read(s.work / "val.scores.json")["runs"]
    figures = {"CIDEr-D, vision-language model, greedy": runs[0]["corpus"]["cider"]}
    figures |= {"CIDEr-D, ours": own[0]["corpus"]["cider"], "CIDEr-D, ours shuffled": own[1]["corpus"]["cider"]}
    figures |= {"CLIPScore, ours": own[0]["corpus"]["clipscore"]} if own[0]["corpus"]["clipscore"] is not None else {}
    if s.instances and (file := s.work / "ground_ours/grounding.json").exists():
        for method in (s.method, "last_mean"):
            figures[f"Match@1, ours, {method}"] = read(file)["rows"][method]["match_at_1"]["score"]
    return figures
