"""P1 against a plain script: LLaVA's three decodings of 24 photos.

    python -m benchmarks.p1_captioning

Plain: `processor` and `generate` one photo at a time, the whole run once a decoding, as course solutions do it. Ours:
photos in batches, encoded and prefilled once for all decodings, which then go side by side. Random weights of real
geometry (336 px, 576 image tokens, 50 new tokens), of layers narrow enough for a CPU; the plain script is given our
samplers, so that all captions can be held against each other. float32.
"""

from functools import partial

import torch
from PIL import Image

from benchmarks.measure import Rounds, interleaved, report
from common.config import run
from common.device import pick_device, seed_everything
from demo.standins import build_llava, llava_processor, train_llava_tokenizer
from models.decoding import generation_config, photo_seed, samplers
from models.vlm import PRESETS, PROMPT, Llava

VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION |= {"image_size": 336, "patch_size": 14}
TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
PHOTOS, BATCH = 24, 8  # photos of random pixels, and how many ours takes at a time
# on a GPU: LLaVA-1.5-7B's shape in bf16
VISION_7B = VISION | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
TEXT_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TEXT_7B |= {"vocab_size": 32064, "max_position_embeddings": 4096}
BATCHES_7B = {1: 4, 8: 24, 32: 64}  # photos a batch: photos in all


def build(device: torch.device, large: bool) -> Llava:
    words = [f"{colour} {thing} by a {thing}" for colour in ("red", "blue", "green") for thing in ("house", "tree")]
    tokenizer = train_llava_tokenizer(words)
    vision, text = (VISION_7B, TEXT_7B) if large else (VISION, TEXT | {"initializer_range": 0.1})
    torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
    with device:
        model = build_llava(tokenizer, vision, text)
    torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.3)  # captions differ by photo
    model.generation_config.eos_token_id = model.config.text_config.bos_token_id  # random weights seldom end early
    return Llava(model, llava_processor(tokenizer, VISION["image_size"], VISION["patch_size"]), PROMPT)


@torch.inference_mode()
def main(cfg: Rounds) -> None:
    seed_everything(0)
    device = pick_device(cfg.device)
    large = device.type == "cuda"
    llava, batches = build(device, large), BATCHES_7B if large else {BATCH: PHOTOS}
    photos = max(batches.values())
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (photos, 6, 8, 3), generator=draw, dtype=torch.uint8)
    images = [Image.fromarray(photo.numpy()).resize((640, 480)) for photo in pixels]
    seeds = {name: [photo_seed(name, photo) for photo in range(photos)] for name in PRESETS}
    model, processor = llava.model, llava.processor
    eos, pad = model.generation_config.eos_token_id, processor.tokenizer.pad_token_id
    few = min(batches.values())

    def plain() -> dict[str, list[str]]:
        captions = {}
        for name, decoding in PRESETS.items():
            texts = []
            for image, seed in zip(images[:few], seeds[name]):
                inputs = processor(images=image, text=llava.prompt, return_tensors="pt").to(model.device, model.dtype)
                ids = model.generate(
                    **inputs,
                    generation_config=generation_config(decoding, eos, pad),
                    logits_processor=samplers(decoding, [seed]),
                )
                text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                texts.append(" ".join(text.split()))
            captions[name] = texts
        return captions

    def ours(batch: int, count: int) -> dict[str, list[str]]:
        captions = {name: [] for name in PRESETS}
        for start in range(0, count, batch):
            own = slice(start, start + batch)
            texts = llava.caption(images[own], PRESETS, {name: seeds[name][own] for name in PRESETS})
            for name in PRESETS:
                captions[name] += texts[name]
        return captions

    forms = {"plain": plain} | {f"ours, batch {size}": partial(ours, size, count) for size, count in batches.items()}
    seconds, captions = interleaved(forms, cfg.rounds)
    per_photo = {name: seconds[name] / len(captions[name]["best"]) for name in forms}
    expected = captions["plain"]
    *_, last = forms
    same = [a == b for name in PRESETS for a, b in zip(expected[name], captions[last][name])]
    distinct = {text for texts in captions[last].values() for text in texts}
    print(
        f"distinct: {len(distinct)}; equal to plain: {sum(same)} of {len(same)}; {torch.cuda.max_memory_allocated() / 1e9 if large else 0:.1f} GB"
    )
    title = f"LLaVA, {len(PRESETS)} decodings, seconds a photo"
    report(title, per_photo, speedup_vs_plain=per_photo["plain"] / per_photo[last], agree=all(same) or large)


if __name__ == "__main__":
    run(main, Rounds)
