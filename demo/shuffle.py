"""Captions given to the wrong photos: their score is what a captioner that ignores the photo would get.

    python -m demo.shuffle --predictions val.json --output val_shuffled.json

No photo keeps its own caption.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from common.config import run
from common.files import write_json
from data.predictions import read_predictions


@dataclass(frozen=True)
class Config:
    predictions: Path
    """Captions of the photos."""
    output: Path
    """Predictions to write."""


def main(cfg: Config) -> None:
    captions = read_predictions(cfg.predictions)
    order = random.Random(0).sample(list(captions), len(captions))
    giver = dict(zip(order, order[1:] + order[:1]))  # one cycle: no photo is its own giver
    write_json(cfg.output, {stem: captions[giver[stem]] for stem in captions})
    print(f"{len(captions)} captions in {cfg.output}")


if __name__ == "__main__":
    run(main, Config)
