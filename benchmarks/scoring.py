"""Scoring against the plain way: CIDEr of 1,000 photos, CLIP's captions, a second run of the same photos.

    python -m benchmarks.scoring

Captions are drawn from the templates of the demo's scenes, five references a photo. CIDEr's plain way takes the steps
of the tools that courses use (language_evaluation, COCO's own): all scorers are made ready first though CIDEr alone is
asked for, so that METEOR's Java program loads beside the tokenizer's two runs: most of the difference. (SPICE's, with a
download of 384 MB, is left out.) CLIP's is one caption at a time padded to 77 tokens, and every photo encoded
for every run. Random weights of the real ViT-B/32, float32.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Rounds, interleaved, report
from common.config import run
from common.device import pick_device, seed_everything
from data.features import FeatureCache
from data.photos import Photo, open_photo
from demo import shapes
from metrics.cider import cider, find_java, tokenize_lines
from metrics.clipscore import Clip, ImageTower, encode_captions, tokenize

PHOTOS, TEXTS, SEEN = 1000, 128, 200  # photos of CIDEr, captions that CLIP encodes, photos that it encodes or finds


def corpus(count: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """References, five a photo, and a caption of each."""
    references, captions = {}, {}
    for number in range(count):
        rng = np.random.default_rng(number)
        scene = shapes.make_scene(rng)
        references[f"{number}"] = shapes.write_captions(scene, rng)
        captions[f"{number}"] = shapes.write_captions(scene, rng)[0]
    return references, captions


def official_cider(references: dict[str, list[str]], captions: dict[str, str], folder: Path) -> dict[str, float]:
    """The steps of the usual tools but for SPICE; the tokenizer gets its jar in `folder`, for it writes beside it."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer import ptbtokenizer

    scorers = Bleu(4), Meteor(), Rouge(), Cider()
    source = ptbtokenizer.__file__
    ptbtokenizer.__file__ = str(folder / "ptbtokenizer.py")
    try:
        tokenizer = ptbtokenizer.PTBTokenizer()
        gold = tokenizer.tokenize({key: [{"caption": text} for text in own] for key, own in references.items()})
        hypotheses = tokenizer.tokenize({key: [{"caption": text}] for key, text in captions.items()})
    finally:
        ptbtokenizer.__file__ = source
    return dict(zip(captions, scorers[3].compute_score(gold, hypotheses)[1].tolist()))


def time_cider(cfg: Rounds) -> tuple[dict[str, float], bool]:
    references, captions = corpus(PHOTOS)
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    os.environ["PATH"] = f"{Path(find_java()).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / jar.name).symlink_to(jar)

        def plain() -> dict[str, float]:
            return official_cider(references, captions, Path(folder))

        def ours() -> dict[str, float]:
            tokenize_lines.cache_clear()  # as for a first run
            return cider(references, captions)[1]

        seconds, scores = interleaved({"cider_plain": plain, "cider": ours}, cfg.rounds)
    return seconds, scores["cider"] == scores["cider_plain"]


def random_clip(device: torch.device) -> Clip:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", device=device)
    return Clip("random", model.eval(), transform, open_clip.get_tokenizer("ViT-B-32-quickgelu"), device)


def time_texts(clip: Clip, cfg: Rounds) -> tuple[dict[str, float], bool]:
    captions = list(corpus(TEXTS)[1].values())

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        texts = (clip.tokenizer([caption]).to(clip.device) for caption in captions)
        return torch.cat([clip.model.encode_text(text, normalize=True) for text in texts])

    forms = {"clip_text_plain": plain, "clip_text": lambda: encode_captions(clip, tokenize(clip, captions)[0])}
    seconds, vectors = interleaved(forms, cfg.rounds)
    return seconds, torch.allclose(vectors["clip_text"], vectors["clip_text_plain"], atol=1e-5)


def time_photos(clip: Clip, cfg: Rounds) -> tuple[dict[str, float], bool]:
    draw = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(SEEN):
            pixels = torch.randint(256, (12, 16, 3), generator=draw, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number:03}.jpg")
        photos = [Photo(path.stem, path) for path in sorted(folder.glob("*.jpg"))]

        @torch.inference_mode()
        def plain() -> torch.Tensor:
            pixels = (clip.transform(open_photo(photo.path))[None].to(clip.device) for photo in photos)
            return torch.cat([clip.model.encode_image(one, normalize=True) for one in pixels]).cpu()

        def cached() -> torch.Tensor:
            features, *_ = FeatureCache(ImageTower(clip), folder / "cache", np.float32).find(photos)
            return features[range(len(photos))][:, 0]

        cached()  # the first run
        seconds, vectors = interleaved({"clip_photos_plain": plain, "clip_photos": cached}, cfg.rounds)
    return seconds, torch.allclose(vectors["clip_photos"], vectors["clip_photos_plain"], atol=1e-5)


def main(cfg: Rounds) -> None:
    seed_everything(0)
    clip = random_clip(pick_device(cfg.device))
    seconds, agree = {}, True
    for part in (lambda: time_cider(cfg), lambda: time_texts(clip, cfg), lambda: time_photos(clip, cfg)):
        more, same = part()
        seconds, agree = seconds | more, agree and same
    report(
        f"Scoring: CIDEr of {PHOTOS} photos, {TEXTS} captions and {SEEN} photos by CLIP",
        seconds,
        cider_speedup=seconds["cider_plain"] / seconds["cider"],
        clip_text_speedup=seconds["clip_text_plain"] / seconds["clip_text"],
        clip_photo_cache_speedup=seconds["clip_photos_plain"] / seconds["clip_photos"],
        agree=agree,
    )


if __name__ == "__main__":
    run(main, Rounds)
