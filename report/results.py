"""Figures and findings of the report, computed from what the steps have made."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.config import check
from common.files import JsonLines
from data.predictions import read_predictions
from metrics.cider import agreement
from report.steps import DECODINGS, Setting


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def score_of(run: dict, metric: str) -> dict[str, Any]:
    """A run's score and its interval; None where there is none."""
    return {"score": run["corpus"].get(metric), "interval": run["intervals"].get(metric)}


def changes_of(compared: dict, metric: str) -> dict[str, dict]:
    """Paired differences from the first run, by the name of the other run."""
    return {change["run"]: change for change in compared.get("paired", ()) if change["metric"] == metric}


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
        runs = [read_predictions(s.work / f"llava.{name}.json")]
        more = sorted(s.work.glob("again_*.moderate.json"))  # greedy captions are the same with every seed
        runs += [
            runs[0] if name == "best" else read_predictions(s.work / one.name.replace("moderate", name)) for one in more
        ]
        drawn = {stem: [run[stem] for run in runs] for stem in list(runs[0])[: s.few]}
        found[name] = float(np.mean([score for scores in agreement(drawn).values() for score in scores]))
    return found


def losses(run: Path) -> tuple[dict[str, list], dict[str, list]]:
    """(step, value) of a run by optimizer step, both stages in a row: training and validation loss; learning rate."""
    rows, keys = JsonLines(run / "metrics.jsonl").rows(), ("loss", "val_loss", "lr")
    check([f"{run} was made by an earlier version; delete {run.parent}"] * any("steps" not in row for row in rows))
    training, validation, rate = ([(row["steps"], row[key]) for row in rows if key in row] for key in keys)
    return {"training": training, "validation": validation}, {"learning rate": rate}


# ------------------------------------------------------------------------------------------- findings


def finding(metric: str, name: str, against: str, changes: list[dict[str, float]]) -> str:
    """A sentence on the difference of `name` from `against`, measured once for each seed.

    >>> finding("CIDEr-D", "diverse", "best", [{"difference": -0.5, "low": -0.7, "high": -0.4}])
    'CIDEr-D is lower with diverse than with best: -0.500 [-0.700, -0.400].'
    """
    sides = {(change["low"] > 0) - (change["high"] < 0) for change in changes}  # 0: the interval holds zero
    numbers = "; ".join(map("{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format_map, changes))
    seeds = f" with each of {len(changes)} seeds" if len(changes) > 1 else ""
    if len(sides) > 1:
        return f"{metric} does not tell {name} from {against}, since the seeds do not agree: {numbers}."
    if sides == {0}:
        return f"{metric} does not tell {name} from {against}; the interval holds zero{seeds}: {numbers}."
    return f"{metric} is {'higher' if sides == {1} else 'lower'} with {name} than with {against}{seeds}: {numbers}."
