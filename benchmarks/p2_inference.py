"""P2's inference against plain scripts: 20 words a photo from GPT-2 small behind 257 image tokens.

    python -m benchmarks.p2_inference

Plain: one photo at a time, the whole sequence read anew for each word, logits at every place (no cache of keys and
values), LoRA beside the weights. `generate`: the same model by transformers' own loop, with its cache, one photo at a
time; and the same with LoRA merged. All float32. Ours: what `p2_inference.py --precision bf16 --batch_size 64` runs; in
float32 its words are held against plain's. Random weights of the real shape, features at hand: no form encodes photos.
Words of random weights are near ties, so that bf16 soon goes another way: what it costs in captions is for real weights
to say (README).
"""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Rounds, interleaved, peak_memory, report
from benchmarks.p2_training import EOS, build, draw
from common.config import run
from common.device import pick_device
from models.captioner import Captioner
from models.decoder import merge_lora
from models.decoding import Decoding

WORDS = Decoding(max_new_tokens=20)
PHOTOS, FEW = (
    {"cpu": 64, "cuda": 512},
    8,
)  # ours captions all in one batch, the plain forms the first few; times are compared a photo


def confident(device: torch.device) -> Captioner:
    """GPT-2's shape with random weights so large that captions differ by photo."""
    captioner = build("gpt2", device).eval()
    nn.init.normal_(captioner.projector.layers.weight, std=0.3)
    for name, weight in captioner.decoder.named_parameters():
        if name.endswith(("c_attn.base_layer.weight", "c_proj.base_layer.weight", "c_fc.base_layer.weight")):
            nn.init.normal_(weight, std=0.1)
    return captioner


def first_words(captioner: Captioner, photo: Tensor) -> Tensor:
    """(P, D_image) -> (1, P + 1, D_text): the image and EOS, as embeddings."""
    start = captioner.decoder.get_input_embeddings()(torch.tensor([[EOS]], device=photo.device))
    return torch.cat([captioner.projector(photo[None]), start], dim=1)


def plain(captioner: Captioner, features: Tensor) -> list[list[int]]:
    captions = []
    for photo in features:
        inputs, caption = first_words(captioner, photo), []
        for _ in range(WORDS.max_new_tokens):
            word = captioner.decoder(inputs_embeds=inputs, use_cache=False).logits[:, -1].argmax(dim=-1)
            caption.append(word.item())
            inputs = torch.cat([inputs, captioner.decoder.get_input_embeddings()(word[None])], dim=1)
        captions.append(caption)
    return captions


def by_generate(captioner: Captioner, features: Tensor) -> list[list[int]]:
    captions = []
    for photo in features:
        inputs = first_words(captioner, photo)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        ids = captioner.decoder.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=WORDS.max_new_tokens, do_sample=False,
            eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
        captions.append(ids[0].tolist())
    return captions


def ours(captioner: Captioner, features: Tensor) -> list[list[int]]:
    return captioner.generate(features, WORDS)


FORMS = {"plain": plain, "generate": by_generate, "generate, merged": by_generate}
FORMS |= {"ours float32": ours, "ours bf16": ours}


def one_form(form: str, photos: int, device: torch.device) -> partial:
    """A form ready to caption the first so many photos."""
    captioner = confident(device)
    if form == "generate, merged":
        captioner.decoder = merge_lora(captioner.decoder)
    elif form.startswith("ours"):
        captioner.merge().place(device, torch.bfloat16 if form == "ours bf16" else torch.float32)
    features, _ = draw("gpt2", device, PHOTOS.get(device.type, FEW))
    return partial(torch.inference_mode()(FORMS[form]), captioner, features[:photos])


def main(cfg: Rounds) -> None:
    device = pick_device(cfg.device)
    many = PHOTOS.get(device.type, FEW)
    sizes = {"plain": 1, "ours bf16": many}
    memory = {form: peak_memory(one_form, form, photos, device) for form, photos in sizes.items()}

    forms = {form: one_form(form, many if form.startswith("ours") else FEW, device) for form in FORMS}
    seconds, captions = interleaved(forms, cfg.rounds)
    per_photo = {form: seconds[form] / len(captions[form]) for form in forms}
    expected = captions["plain"]
    same = sum(a == b for one, other in zip(expected, captions["ours bf16"]) for a, b in zip(one, other))
    print(f"distinct captions: {len(set(map(tuple, captions['ours bf16'])))} of {many}")
    report(
        f"captioning, {WORDS.max_new_tokens} words a photo, seconds a photo",
        per_photo,
        speedup_vs_plain=per_photo["plain"] / per_photo["ours bf16"],
        speedup_vs_generate=per_photo["generate"] / per_photo["ours bf16"],
        speedup_vs_generate_merged=per_photo["generate, merged"] / per_photo["ours bf16"],
        float32_speedup_vs_plain=per_photo["plain"] / per_photo["ours float32"],
        float32_speedup_vs_generate=per_photo["generate"] / per_photo["ours float32"],
        bf16_words_equal=same / sum(map(len, expected)),
        peak_memory_plain_mb=memory["plain"] / 1e6,
        peak_memory_ours_mb_a_photo=memory["ours bf16"] / 1e6 / many,
        agree=expected == captions["generate"] == captions["generate, merged"] == captions["ours float32"][:FEW]
        and all(len(caption) == WORDS.max_new_tokens for own in captions.values() for caption in own),
    )


if __name__ == "__main__":
    run(main, Rounds)
