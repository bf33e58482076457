"""P1: zero-shot captions of photos with LLaVA or another vision-language model, several decodings in one run.

    python p1_llava_caption.py --images MY_PHOTOS --output captions.json                       # LLaVA-1.5-7B, greedy
    python p1_llava_caption.py --images MY_PHOTOS --output captions.json --quantize 4bit       # on a card of 8 GB
    python p1_llava_caption.py --images MY_PHOTOS --output captions.json --decoding best moderate diverse
    python p1_llava_caption.py --model SMALL_LLAVA --images MY_PHOTOS --output captions.json --device cpu

With one decoding the captions go to captions.json, with several to captions.best.json and so on. A photo that cannot
be decoded is named, skipped and counted. A stopped run goes on where it was when the same command is given again.
"""

import common  # noqa: F401  Ctrl-C ends what is loaded below without a traceback

# isort: split
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from common.config import CommonSettings, check, run
from common.device import Precision, library_versions, pick_device, torch_dtype
from common.files import files_hash
from data.annotations import find_photos
from data.journal import Journal
from data.photos import PhotoBatches
from models.decoding import PRESETS, Decoding, check_decoding, photo_seed
from models.vlm import PROMPT, Fit, Quantize, load_vlm


@dataclass(frozen=True)
class Config(CommonSettings):
    """Settings of a captioning run; the defaults are the published run."""

    images: list[Path]
    """Folders of photos, photos, patterns such as 'photos/*.jpg', lists with one path a line, or annotation files."""
    output: Path
    """Predictions JSON to write; with several decodings NAME.DECODING.json each."""
    model: str = "llava-hf/llava-1.5-7b-hf"
    """A vision-language model of transformers: hub id or local folder."""
    prompt: str = PROMPT
    """What the model is asked, put into its chat template; by default as LLaVA-1.5 was asked in training."""
    decoding: list[Literal["best", "moderate", "diverse", "own"]] = field(default_factory=lambda: ["best"])
    """best (greedy), moderate (T 0.7, top-p 0.9, top-k 50), diverse (T 0.9, top-p 0.95, top-k 100), own (as below)."""
    own: Decoding = Decoding()
    """The decoding named own."""
    recursive: bool = False
    """Enter the subfolders of `images` too; photos of one name are then told apart by their folders."""
    batch_size: PositiveInt = 8
    """Photos captioned at a time."""
    workers: PositiveInt = 2
    """Threads that decode photos ahead."""
    precision: Precision | Literal["auto"] = "auto"
    """auto is bf16 on CUDA and float32 elsewhere."""
    fit: Fit = "processor"
    """processor: photos as the processor takes them; pad: padded to squares first, as in LLaVA-1.5's training."""
    quantize: Quantize = "none"
    """Hold the weights in 8 or 4 bits, by bitsandbytes on a CUDA GPU."""


def check_settings(cfg: Config) -> None:
    """Raise a UserError for what is wrong with the settings alone."""
    problems = check_decoding("own", cfg.own)
    if cfg.own != Decoding() and "own" not in cfg.decoding:
        problems.append("own: these settings are of the decoding `own`, not chosen; expected own in decoding")
    check(problems)


def main(cfg: Config) -> None:
    check_settings(cfg)
    photos, device = find_photos(cfg.images, cfg.limit, cfg.recursive, cfg.output), pick_device(cfg.device)
    precision = cfg.precision if cfg.precision != "auto" else "bf16" if device.type == "cuda" else "float32"
    decodings = {name: cfg.own if name == "own" else PRESETS[name] for name in cfg.decoding}
    shared = {name: getattr(cfg, name) for name in ("model", "prompt", "quantize", "fit", "seed")}
    shared |= {"precision": precision, "model_files": files_hash(cfg.model), "versions": library_versions()}
    settings = {name: shared | {"decoding": {"name": name} | asdict(decodings[name])} for name in decodings}
    journal = Journal(cfg.output, settings, cfg.overwrite)

    model = load_vlm(cfg.model, cfg.prompt, device, torch_dtype(precision), cfg.quantize, cfg.fit)
    batches = PhotoBatches(journal.missing(photos), cfg.batch_size, cfg.workers, "caption", done=len(journal.captions))
    for batch in batches:
        seeds = {name: [photo_seed(cfg.seed, name, photo.stem) for photo in batch] for name in decodings}
        journal.append(batch, model.generate(batch, decodings, seeds), model.text)
    journal.finish(photos, batches.bad, {"device": str(device)})


if __name__ == "__main__":
    run(main, Config)
