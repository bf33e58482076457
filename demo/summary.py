"""The main figures of the drawn scenes, as one JSON object.

python -m demo.summary --folder runs/demo --method rel --output runs/demo/summary.json
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
    """Results of the demo's steps."""
    method: str
    """P3's method."""
    output: Path
    """JSON to write, {name: figure}."""


def main(cfg: Config) -> None:
    def read(name: str) -> dict:
        return json.loads((cfg.folder / name).read_text(encoding="utf-8"))

    ours, shuffled = (run["corpus"]["cider"] for run in read("val.scores.json")["runs"])
    pairs = pair_scores(read_predictions(cfg.folder / "val.json"), cfg.folder / "shapes/instances_val.json")
    summary = {"cider": ours, "cider_shuffled": shuffled, **pairs}
    for name, one in zip(("best", "moderate", "diverse"), read("scores.json")["runs"]):
        summary[f"cider_llava_{name}"] = one["corpus"]["cider"]
    rows = read("ground_ours/grounding.json")["rows"]
    chosen = {"": cfg.method, "_last_mean": "last_mean", "_random_weights": f"random weights, {cfg.method}"}
    summary |= {f"match_at_1{ending}": rows[row]["match_at_1"]["score"] for ending, row in chosen.items()}
    write_json(cfg.output, summary | {"pointing": rows[cfg.method]["pointing"]["score"]})
    print(cfg.output)


if __name__ == "__main__":
    run(main, Config)
