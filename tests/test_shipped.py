"""The captioner that ships: its size, its captions, and on real photos its score against shuffled captions."""

import json
from pathlib import Path

import pytest
import torch

import p2_inference
from data.annotations import read_annotations
from data.predictions import read_predictions
from metrics.cider import cider
from models.checkpoint import check_checkpoint, load_captioner
from report.steps import PHOTO

SHIPPED = Path("checkpoints/flickr8k")


def caption(images: Path, output: Path, **settings) -> dict[str, str]:
    settings = {"features": output.parent / "features"} | settings
    p2_inference.main(p2_inference.Config(SHIPPED, images, output, device="cpu", **settings))
    return read_predictions(output)


def test_it_is_small_and_captions_a_photo_offline(tmp_path):
    check_checkpoint(SHIPPED)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) < 16e6
    text = caption(PHOTO, tmp_path / "photo.json")["grace_hopper"]
    assert len(text.split()) >= 4 and {"man", "woman", "person"} & set(text.lower().split())


def test_its_log_and_its_parameters_are_those_of_the_model_card():
    captioner = load_captioner(SHIPPED)
    trained = [p for name, p in captioner.named_parameters() if "lora_" in name or name.startswith("projector")]
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert f"{sum(map(torch.numel, trained)):,} parameters" in card
    log = [json.loads(line) for line in (SHIPPED / "metrics.jsonl").read_text().splitlines()]
    assert f"{min(row['val_loss'] for row in log if 'val_loss' in row):.3f}" in card


def test_its_captions_belong_to_their_photos(real_data, tmp_path):
    """The first 60 of Flickr8k's development photos; n-grams weighed by all 1,000 photos' references."""
    own = caption(real_data / "flickr8k/val.json", tmp_path / "val.json", limit=60, batch_size=30)
    photos = read_annotations(real_data / "flickr8k/val.json")
    references = {photo.stem: list(photo.captions) for photo in photos}
    stems, empty = list(own), dict.fromkeys(references, "")
    shuffled = {stem: own[giver] for stem, giver in zip(stems, stems[1:] + stems[:1])}
    score, other = (sum(cider(references, empty | run)[1].values()) / len(stems) for run in (own, shuffled))
    assert score > 0.5 and score > 3 * other
    assert score == pytest.approx(0.7, abs=0.2)
