"""P2, inference: a run and photos -> captions.

    python p2_inference.py --checkpoint checkpoints/flickr8k --images MY_PHOTOS --output captions.json
    python p2_inference.py --checkpoint runs/p2_r32 --images DATA/images/val --output val.json --decoding.num_beams 3

Greedy by default. The output is one JSON object {photo's name without ending: caption}; what made it stands in
captions.meta.json beside it, with the captions that are empty, cut at max_new_tokens, or repeat themselves. A photo
that cannot be decoded is named, skipped and counted. A stopped run goes on where it was when the same command is given
again.
"""

import common  # noqa: F401  Ctrl-C ends what is loaded below without a traceback

# isort: split
from dataclasses import asdict, dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt

from common.config import CommonSettings, check, run
from common.device import Precision, library_versions, pick_device, torch_dtype
from common.files import FEATURES
from data.annotations import find_photos
from data.journal import Journal
from data.photos import PhotoBatches
from models.checkpoint import checkpoint_hash, find_checkpoint, load_captioner
from models.decoding import Decoding, check_decoding, photo_seed


@dataclass(frozen=True)
class Config(CommonSettings):
    """Settings of a captioning run."""

    checkpoint: Path
    """A run folder of p2_train.py (its best/ is taken), a checkpoint folder in it, or USER/NAME of the model hub."""
    images: list[Path]
    """Folders of photos, photos, patterns such as 'photos/*.jpg', lists with one path a line, or annotation files."""
    output: Path
    """Predictions JSON to write."""
    decoding: Decoding = Decoding()
    """How a caption is chosen; greedy by default."""
    recursive: bool = False
    """Enter the subfolders of `images` too; photos of one name are then told apart by their folders."""
    batch_size: PositiveInt = 16
    """Photos captioned at a time."""
    workers: PositiveInt = 2
    """Threads that decode photos ahead."""
    features: Path = FEATURES
    """Folder of features that training stored. They are read, so that those photos are not encoded again."""
    precision: Precision = "float32"
    """float32 is exact; bf16 and fp16 are faster where the hardware multiplies them well."""


def main(cfg: Config) -> None:
    check(check_decoding("decoding", cfg.decoding))
    photos, device = find_photos(cfg.images, cfg.limit, cfg.recursive, cfg.output), pick_device(cfg.device)
    folder, decodings = find_checkpoint(cfg.checkpoint), {"caption": cfg.decoding}
    settings = {"checkpoint": folder, "decoding": asdict(cfg.decoding), "precision": cfg.precision, "seed": cfg.seed}
    settings |= {"checkpoint_files": checkpoint_hash(folder), "versions": library_versions()}
    journal = Journal(cfg.output, {"caption": settings}, cfg.overwrite)

    model = load_captioner(folder)
    model.check_room(cfg.decoding.max_new_tokens, "decoding.max_new_tokens")
    model.ready(device, torch_dtype(cfg.precision), cfg.features)
    batches = PhotoBatches(journal.missing(photos), cfg.batch_size, cfg.workers, "caption", done=len(journal.captions))
    for batch in batches:
        seeds = {"caption": [photo_seed(cfg.seed, photo.stem) for photo in batch]}
        journal.append(batch, model.generate(batch, decodings, seeds), model.text)
    journal.finish(photos, batches.bad, {"captioner": asdict(model.config), "device": str(device)})


if __name__ == "__main__":
    run(main, Config)
