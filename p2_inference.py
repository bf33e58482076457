"""P2, inference: a run and photos -> captions.

    python p2_inference.py --checkpoint checkpoints/flickr8k --images MY_PHOTOS --output captions.json
    python p2_inference.py --checkpoint runs/p2_r32 --images DATA/images/val --output val.json --decoding.num_beams 3

Greedy by default. The output is one JSON object {photo's name without ending: caption}; what made it stands in
captions.meta.json beside it. A photo that cannot be decoded is named, skipped and counted. A stopped run goes on
where it was when the same command is given again.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from common.config import check, run
from common.device import Precision, library_versions, pick_device, torch_dtype
from data.annotations import find_photos
from data.journal import Journal
from data.photos import PhotoBatches
from models.checkpoint import find_checkpoint, load_captioner
from models.decoding import Decoding, check_decoding, photo_seed


@dataclass(frozen=True)
class Config:
    """Settings of a captioning run."""

    checkpoint: Path
    """A run folder of p2_train.py (its best/ is taken), or a checkpoint folder in it."""
    images: Path
    """Folder of photos, a photo, a text file with one path a line, or an annotation file."""
    output: Path
    """Predictions JSON to write."""
    overwrite: bool = False
    """Replace an output that is there, and begin anew."""
    decoding: Decoding = Decoding()
    """How a caption is chosen; greedy by default."""
    batch_size: PositiveInt = 16
    """Photos captioned at a time."""
    workers: NonNegativeInt = 2
    """Threads that decode photos ahead."""
    features: Path = Path("runs/features")
    """Cache of encoded photos that training left; what is in it need not be encoded, nothing is added."""
    precision: Precision = "float32"
    """float32 is exact; bf16 and fp16 are faster where the hardware multiplies them well."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: int = 0
    """What sampling draws for a photo depends on this and the photo's name."""
    limit: PositiveInt | None = None
    """Only the first so many photos."""


def main(cfg: Config) -> None:
    check(check_decoding("decoding", cfg.decoding))
    photos, device = find_photos(cfg.images, limit=cfg.limit), pick_device(cfg.device)
    folder, decodings = find_checkpoint(cfg.checkpoint), {"caption": cfg.decoding}
    settings = {"checkpoint": folder, "decoding": asdict(cfg.decoding), "precision": cfg.precision, "seed": cfg.seed}
    settings |= {"versions": library_versions()}
    journal = Journal(cfg.output, {name: settings for name in decodings}, cfg.overwrite)

    model = load_captioner(folder)
    model.check_room(cfg.decoding.max_new_tokens, "decoding.max_new_tokens")
    model.ready(device, torch_dtype(cfg.precision), cfg.features)
    batches = PhotoBatches(journal.missing(photos), cfg.batch_size, cfg.workers, "caption", done=journal.done)
    for batch in batches:
        seeds = {name: [photo_seed(cfg.seed, photo.stem) for photo in batch] for name in decodings}
        captions = model.generate(batch, decodings, seeds)
        journal.append(batch, {name: [model.text(ids) for ids in captions[name]] for name in decodings})
    journal.finish(photos, batches.bad, {"captioner": asdict(model.config), "device": str(device)})


if __name__ == "__main__":
    run(main, Config)
