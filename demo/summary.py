"""The main figures of the demo, or of the report, as one JSON object.

    python -m demo.summary --folder runs/demo --method rel --output runs/demo/summary.json

`python -m report` prints them at its end.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.config import run
from common.files import write_json
from data.predictions import read_predictions
from demo.shapes import pair_scores


@dataclass(frozen=True)
class Config:
    folder: Path
    """Results of the steps of report/steps.yaml."""
    method: str
    """P3's method."""
    output: Path
    """JSON to write, {name: figure}."""


def main(cfg: Config) -> None:
    def read(name: str) -> dict:
        return json.loads((cfg.folder / name).read_text(encoding="utf-8"))

    ours, shuffled = (run["corpus"]["cider"] for run in read("val.scores.json")["runs"])
    summary = {"cider": ours, "cider_shuffled": shuffled}
    scenes = cfg.folder / "shapes/instances_val.json"
    summary |= pair_scores(read_predictions(cfg.folder / "val.json"), scenes) if scenes.exists() else {}
    for name, one in zip(("best", "moderate", "diverse"), read("scores.json")["runs"]):
        summary[f"cider_llava_{name}"] = one["corpus"]["cider"]
    if (cfg.folder / "ground_ours").exists():
        rows = read("ground_ours/grounding.json")["rows"]
        chosen = {"": cfg.method, "_last_mean": "last_mean", "_random_weights": f"random weights, {cfg.method}"}
        summary |= {f"match_at_1{ending}": rows[row]["match_at_1"]["score"] for ending, row in chosen.items()}
        summary["pointing"] = rows[cfg.method]["pointing"]["score"]
    write_json(cfg.output, summary)
    print(cfg.output)


if __name__ == "__main__":
    run(main, Config)
