"""P1 against a plain script: LLaVA's three decodings of 24 photos.

    python -m benchmarks.p1_captioning

Plain: `processor` and `generate` one photo at a time, the whole run once a decoding, as course solutions do it. Ours:
photos in batches, encoded and prefilled once for all decodings, which then go side by side. Random weights of real
geometry (336 px, 576 image tokens, 50 new tokens), of layers narrow enough for a CPU; the plain script is given our
samplers, so that all captions can be held against each other. float32.
"""

import torch
from PIL import Image

from benchmarks.measure import Rounds, interleaved, report
from common import pick_device, run, seed_everything
from demo.standins import build_llava, llava_processor, train_llava_tokenizer
from models.llava import PRESETS, PROMPT, Llava
from models.sampling import generation_config, photo_seed, samplers

VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION |= {"image_size": 336, "patch_size": 14}
TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
PHOTOS, BATCH = 24, 8  # photos of random pixels, and how many ours takes at a time


def build(device: torch.device) -> Llava:
    words = [f"{colour} {thing} by a {thing}" for colour in ("red", "blue", "green") for thing in ("house", "tree")]
    tokenizer = train_llava_tokenizer(words)
    model = build_llava(tokenizer, VISION, TEXT | {"initializer_range": 0.1}).to(device)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.3)  # captions differ by photo
    model.generation_config.eos_token_id = model.config.text_config.bos_token_id  # random weights seldom end early
    return Llava(model, llava_processor(tokenizer, VISION["image_size"], VISION["patch_size"]), PROMPT)


@torch.inference_mode()
def main(cfg: Rounds) -> None:
    seed_everything(0)
    llava = build(pick_device(cfg.device))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (PHOTOS, 6, 8, 3), generator=draw, dtype=torch.uint8)
    images = [Image.fromarray(photo.numpy()).resize((640, 480)) for photo in pixels]
    seeds = {name: [photo_seed(name, photo) for photo in range(PHOTOS)] for name in PRESETS}
    model, processor = llava.model, llava.processor
    eos, pad = model.generation_config.eos_token_id, processor.tokenizer.pad_token_id

    def plain() -> dict[str, list[str]]:
        captions = {}
        for name, decoding in PRESETS.items():
            texts = []
            for image, seed in zip(images, seeds[name]):
                inputs = processor(images=image, text=llava.prompt, return_tensors="pt").to(model.device)
                ids = model.generate(
                    **inputs,
                    generation_config=generation_config(decoding, eos, pad),
                    logits_processor=samplers(decoding, [seed]),
                )
                text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                texts.append(" ".join(text.split()))
            captions[name] = texts
        return captions

    def ours() -> dict[str, list[str]]:
        captions = {name: [] for name in PRESETS}
        for start in range(0, PHOTOS, BATCH):
            own = slice(start, start + BATCH)
            batch = llava.caption(images[own], PRESETS, {name: seeds[name][own] for name in PRESETS})
            for name, texts in batch.items():
                captions[name] += texts
        return captions

    seconds, captions = interleaved({"plain": plain, "ours": ours}, cfg.rounds)
    distinct = {text for texts in captions["plain"].values() for text in texts}
    agree = captions["plain"] == captions["ours"] and len(distinct) > PHOTOS
    title = f"LLaVA, {PHOTOS} photos, {len(PRESETS)} decodings"
    report(title, seconds, speedup_vs_plain=seconds["plain"] / seconds["ours"], agree=agree)


if __name__ == "__main__":
    run(main, Rounds)
