"""Scoring against the plain way: CIDEr of 1,000 photos, and a second run's CLIPScore on the same 200 photos.

    python -m benchmarks.scoring

The captions come from the templates of the demo's scenes, five references a photo. CIDEr's plain way takes the steps of
the tools that courses use (language_evaluation, COCO's own). They load METEOR too, although only CIDEr is asked for:
its Java program starts beside the tokenizer's two runs, which is most of the difference. (They also load SPICE, which
is left out here: it needs a download of 384 MB.) CLIP's plain way encodes each photo again for each run. Random weights
of the real ViT-B/32, float32.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch

from benchmarks.measure import Rounds, interleaved, report, write_photos
from common.config import run
from common.device import pick_device
from data.photos import load_photo
from demo import shapes
from metrics.cider import JAVA, cider, tokenize_lines
from metrics.clipscore import Clip, ImageTower
from models.features import encode_files

PHOTOS, SEEN = 1000, 200  # photos of CIDEr, photos that CLIP encodes or finds


def corpus(count: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """References, five a photo, and a caption of each."""
    draws = {f"{number}": np.random.default_rng(number) for number in range(count)}
    scenes = {key: shapes.make_scene(rng) for key, rng in draws.items()}
    references = {key: shapes.write_captions(scene, draws[key]) for key, scene in scenes.items()}
    return references, {key: shapes.write_captions(scene, draws[key])[0] for key, scene in scenes.items()}


def official_cider(references: dict[str, list[str]], captions: dict[str, str]) -> dict[str, float]:
    """The steps of the usual tools, of those that cost time."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    _, tokenize = Meteor(), PTBTokenizer().tokenize  # the first starts a Java program
    gold = tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    found = tokenize({key: [{"caption": text}] for key, text in captions.items()})
    return dict(zip(captions, Cider().compute_score(gold, found)[1].tolist()))


def time_cider(cfg: Rounds) -> tuple[dict[str, float], bool]:
    references, captions = corpus(PHOTOS)
    os.environ["PATH"] = f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}"  # the usual tools call `java`

    def ours() -> dict[str, float]:
        tokenize_lines.cache_clear()  # as in a first run
        return cider(references, captions)[1]

    forms = {"cider_plain": lambda: official_cider(references, captions), "cider": ours}
    seconds, scores = interleaved(forms, cfg.rounds)
    return seconds, scores["cider"] == scores["cider_plain"]


def time_photos(cfg: Rounds) -> tuple[dict[str, float], bool]:
    name, device = "ViT-B-32-quickgelu", pick_device(cfg.device)
    model, _, transform = open_clip.create_model_and_transforms(name, device=device)
    clip = Clip(model.eval(), transform, open_clip.get_tokenizer(name), device)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), SEEN)

        def plain() -> torch.Tensor:
            pixels = (clip.transform(load_photo(photo).image)[None].to(clip.device) for photo in photos)
            return torch.cat([clip.model.encode_image(one, normalize=True) for one in pixels]).cpu()

        def cached() -> torch.Tensor:
            features, *_ = encode_files(ImageTower(clip), photos, Path(folder) / "cache", dtype=np.float32)
            return features[range(len(photos))][:, 0]

        cached()  # the first run
        seconds, vectors = interleaved({"clip_photos_plain": plain, "clip_photos": cached}, cfg.rounds)
    return seconds, torch.allclose(vectors["clip_photos"], vectors["clip_photos_plain"], atol=1e-5)


@torch.inference_mode()
def main(cfg: Rounds) -> None:
    torch.manual_seed(0)
    (seconds, same), (of_photos, close) = time_cider(cfg), time_photos(cfg)
    speedups = {"cider_speedup": seconds["cider_plain"] / seconds["cider"]}
    speedups["clip_photo_cache_speedup"] = of_photos["clip_photos_plain"] / of_photos["clip_photos"]
    report(f"CIDEr of {PHOTOS} photos, {SEEN} by CLIP", seconds | of_photos, speedups | {"agree": same and close})


if __name__ == "__main__":
    run(main, Rounds)
