"""P2, inference: a run and photos -> captions.

    python p2_inference.py --checkpoint checkpoints/flickr8k --images MY_PHOTOS --output captions.json
    python p2_inference.py --checkpoint runs/p2_r32 --images DATA/images/val --output val.json --decoding.num_beams 3

Greedy by default. The output is one JSON object {photo's name without ending: caption}; what made it stands in
captions.meta.json beside it. A photo that cannot be decoded is named, skipped and counted.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from tqdm import tqdm

from common import (
    NothingDone,
    Precision,
    UserError,
    check_output,
    library_versions,
    pick_device,
    run,
    seed_everything,
    torch_dtype,
)
from data.annotations import Photo, find_photos
from data.images import BadPhoto, load_photos
from data.predictions import write_predictions
from models.captioner import Captioner, Decoding
from models.checkpoint import find_checkpoint, load_captioner


@dataclass(frozen=True)
class Config:
    """Settings of a captioning run."""

    checkpoint: str
    """A run folder of p2_train.py (its best/ is taken), or a checkpoint folder in it."""
    images: str
    """Folder of photos, a photo, a text file with one path a line, or an annotation file."""
    output: str
    """Predictions JSON to write."""
    overwrite: bool = False
    """Replace an output that is there."""
    decoding: Decoding = Decoding()
    """How a caption is chosen; greedy by default."""
    batch_size: PositiveInt = 16
    """Photos captioned at a time."""
    precision: Precision = "float32"
    """float32 is exact; bf16 and fp16 are faster where the hardware multiplies them well."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: int = 0
    """Decides what sampling draws."""
    limit: PositiveInt | None = None
    """Only the first so many photos."""


def caption_photos(
    captioner: Captioner, photos: Iterable[tuple[Photo, Image.Image]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[str, str]]:
    """Yield (stem, caption), a batch at a time. The captioner's LoRA should be merged."""
    photos = iter(photos)
    while batch := list(islice(photos, batch_size)):
        pixels = torch.stack([captioner.encoder.transform(image) for _, image in batch]).to(captioner.encoder.device)
        features = captioner.encoder(pixels)  # (B, P, D)
        yield from zip((photo.stem for photo, _ in batch), captioner.caption(features, decoding))


def main(cfg: Config) -> None:
    output = Path(cfg.output)
    check_output(output, cfg.overwrite)
    if cfg.decoding.num_beams > 1 and cfg.decoding.do_sample:
        raise UserError("decoding.num_beams: expected 1 with do_sample, got beams and sampling at once")
    photos = find_photos(Path(cfg.images), limit=cfg.limit)
    folder, device = find_checkpoint(Path(cfg.checkpoint)), pick_device(cfg.device)
    captioner = load_captioner(folder).merge()
    captioner.encoder.to(device)
    captioner.projector.to(device)
    captioner.decoder.to(device, torch_dtype(cfg.precision))

    seed_everything(cfg.seed)
    skipped: list[BadPhoto] = []

    def readable() -> Iterator[tuple[Photo, Image.Image]]:
        for photo, image in tqdm(load_photos(photos), total=len(photos), desc="caption"):
            if isinstance(image, BadPhoto):
                skipped.append(image)
                tqdm.write(f"skipped {image}", file=sys.stderr)
            else:
                yield photo, image

    start = time.monotonic()
    captions = dict(caption_photos(captioner, readable(), cfg.decoding, cfg.batch_size))
    if not captions:
        raise NothingDone(f"none of {len(photos)} photos could be decoded")
    write_predictions(output, captions, {
        "model": str(folder), "captioner": asdict(captioner.config), "decoding": asdict(cfg.decoding),
        "precision": cfg.precision, "device": str(device), "seed": cfg.seed, "versions": library_versions(),
        "seconds": round(time.monotonic() - start, 2), "skipped": {bad.path.name: bad.reason for bad in skipped},
    })  # fmt: skip
    print(f"{len(captions)} captions in {output}" + (f", {len(skipped)} photos skipped" if skipped else ""))


if __name__ == "__main__":
    run(main, Config)
