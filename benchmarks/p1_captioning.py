"""P1 against a plain script: the three decodings of LLaVA.

    python -m benchmarks.p1_captioning

Plain, as course solutions do it: `processor` and `generate`, one photo at a time, the whole run once for each decoding.
Ours: photos in batches; each photo is encoded and the prompt is read once for all decodings, which are then rows of one
batch. The model has random weights and the real geometry (336 px, 576 image tokens, 50 new tokens): on a CPU with
narrow layers in float32, on a GPU with the shape of LLaVA-1.5-7B in bf16. The plain script uses our samplers, so that
its captions can be compared with ours.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import Rounds, by_device, interleaved, report, write_photos
from common.config import run
from common.device import pick_device
from data.photos import LoadedPhoto, load_photo
from demo.standins import build_llava, llava_processor, train_llava_tokenizer
from models.decoding import PRESETS, generation_config, photo_seed, processors, until_eos
from models.vlm import PROMPT, VisionLanguageModel

BATCHES = {"cpu": {8: 24}, "cuda": {1: 4, 8: 24, 32: 64}}  # photos a batch: photos in all; plain takes the first
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
SHAPE = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
VISION = {"cpu": (512, 2048, 6, 8), "cuda": (1024, 4096, 24, 16)}
TEXT = {"cpu": (512, 1376, 8, 8), "cuda": (4096, 11008, 32, 32)}
OTHER = {"cpu": {"initializer_range": 0.1}, "cuda": {"vocab_size": 32064}}  # of the language model

Seeds = dict[str, list[int]]  # one for each photo, by decoding


def build(device: torch.device) -> VisionLanguageModel:
    tokenizer = train_llava_tokenizer(["red house by a blue tree", "green tree by a red house"])
    vision = dict(zip(SHAPE, by_device(VISION, device))) | {"image_size": 336, "patch_size": 14}
    text = dict(zip(SHAPE, by_device(TEXT, device))) | by_device(OTHER, device)
    with device:
        model = build_llava(tokenizer, vision, text).to(by_device(DTYPES, device))
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.3)  # captions differ by photo
    model.generation_config.eos_token_id = model.config.text_config.bos_token_id  # random weights seldom write it
    return VisionLanguageModel(model, llava_processor(tokenizer, image_size=336, patch_size=14), PROMPT)


def plain(vlm: VisionLanguageModel, photos: list[LoadedPhoto], seeds: Seeds) -> dict[str, list]:
    model, processor, captions = vlm.model, vlm.processor, {}
    for name, decoding in PRESETS.items():
        captions[name] = []
        for photo, seed in zip(photos, seeds[name]):
            inputs = processor(images=photo.image, text=vlm.prompt, return_tensors="pt").to(model.device, model.dtype)
            inputs |= {"generation_config": generation_config(decoding, vlm.eos)}
            ids = model.generate(**inputs, logits_processor=processors(decoding, [seed], inputs["input_ids"], vlm.eos))
            captions[name] += until_eos(ids[:, inputs["input_ids"].shape[1] :], vlm.eos)
    return captions


def ours(vlm: VisionLanguageModel, photos: list[LoadedPhoto], seeds: Seeds, batch: int) -> dict[str, list]:
    parts = [slice(start, start + batch) for start in range(0, len(photos), batch)]
    found = [vlm.generate(photos[part], PRESETS, {name: seeds[name][part] for name in PRESETS}) for part in parts]
    return {name: [ids for one in found for ids in one[name]] for name in PRESETS}


@torch.inference_mode()
def main(cfg: Rounds) -> None:
    torch.manual_seed(0)
    device = pick_device(cfg.device)
    vlm, batches = build(device), by_device(BATCHES, device)
    with TemporaryDirectory() as folder:
        photos = [load_photo(photo) for photo in write_photos(Path(folder), max(batches.values()))]
    seeds = {name: [photo_seed(name, number) for number in range(len(photos))] for name in PRESETS}

    forms = {"plain": partial(plain, vlm, photos[: min(batches.values())], seeds)}
    forms |= {f"ours, batch {size}": partial(ours, vlm, photos[:n], seeds, size) for size, n in batches.items()}
    seconds, captions = interleaved(forms, cfg.rounds)
    seconds, last = {name: seconds[name] / len(captions[name]["best"]) for name in forms}, list(forms)[-1]
    distinct = len({str(ids) for found in captions[last].values() for ids in found})
    # in bf16 the likeliest words of random weights are near ties, so captions are compared in float32
    found = [form(vlm.float(), photos[:2], seeds) for form in (plain, partial(ours, batch=2))]
    equal = sum(a == b for name in PRESETS for a, b in zip(found[0][name], found[1][name])) / (2 * len(PRESETS))
    figures = {"speedup_vs_plain": seconds["plain"] / seconds[last], "captions_equal": equal}
    figures |= {"distinct_captions": distinct, "agree": equal >= by_device({"cpu": 1.0, "cuda": 0.8}, device)}
    report(f"LLaVA, {len(PRESETS)} decodings, seconds a photo", seconds, figures)


if __name__ == "__main__":
    run(main, Rounds)
