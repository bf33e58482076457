"""P2's inference against plain scripts: 20 words a photo from GPT-2 small behind 257 image tokens.

    python -m benchmarks.p2_inference

Plain: one photo at a time, the whole sequence is read again for each word, logits at every place (no cache of keys and
values), LoRA beside the weights. `generate`: the same model by transformers' own loop, with its cache, one photo at a
time; and the same with LoRA merged. All in float32. Ours: what `p2_inference.py --precision bf16 --batch_size 64` runs;
in float32 its words are compared with plain's. Random weights of the real shape; no form encodes photos. The words of
random weights are near ties, so bf16 soon writes others: what bf16 costs, the model card of the captioner that ships
says.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Rounds, by_device, interleaved, peak_memory, report
from benchmarks.p2_training import EOS, build, draw
from common.config import run
from common.device import pick_device
from models.captioner import Captioner
from models.decoder import merge_lora
from models.decoding import Decoding

WORDS = Decoding(max_new_tokens=20)
PHOTOS, FEW = {"cpu": 64, "cuda": 512}, 8  # ours captions all in one batch, the plain forms only the first few


def confident(device: torch.device, plain: bool) -> Captioner:
    """GPT-2's shape with random weights so large that captions differ by photo."""
    captioner = build("gpt2", device, plain).eval()
    nn.init.normal_(captioner.projector.layers.weight, std=0.3)
    for name, weight in captioner.decoder.named_parameters():
        if name.endswith(("c_attn.base_layer.weight", "c_proj.base_layer.weight", "c_fc.base_layer.weight")):
            nn.init.normal_(weight, std=0.1)
    return captioner


def prefix(captioner: Captioner, photo: Tensor) -> Tensor:
    """(P, D_image) -> (1, P + 1, D_text): the image and EOS, as embeddings."""
    start = captioner.decoder.get_input_embeddings()(torch.tensor([[EOS]], device=photo.device))
    return torch.cat([captioner.projector(photo[None]), start], dim=1)


def plain(captioner: Captioner, photo: Tensor) -> list[int]:
    inputs, caption = prefix(captioner, photo), []
    for _ in range(WORDS.max_new_tokens):
        word = captioner.decoder(inputs_embeds=inputs, use_cache=False).logits[:, -1].argmax(dim=-1)
        caption.append(word.item())
        inputs = torch.cat([inputs, captioner.decoder.get_input_embeddings()(word[None])], dim=1)
    return caption


def by_generate(captioner: Captioner, photo: Tensor) -> list[int]:
    ends = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS, "max_new_tokens": WORDS.max_new_tokens}
    return captioner.decoder.generate(inputs_embeds=prefix(captioner, photo), **ends)[0].tolist()


PLAIN = {"plain": plain, "generate": by_generate, "generate, merged": by_generate}


def one_form(form: str, photos: int, device: torch.device) -> Callable[[], list[list[int]]]:
    """A form that is ready to caption the first so many photos."""
    one = PLAIN.get(form)
    captioner = confident(device, plain=one is not None)
    features = draw("gpt2", device, by_device(PHOTOS, device))[0][:photos]
    if form == "generate, merged":
        captioner.decoder = merge_lora(captioner.decoder)
    if one:
        return torch.inference_mode()(lambda: [one(captioner, photo) for photo in features])
    captioner.ready(device, torch.bfloat16 if form == "ours bf16" else torch.float32)
    return lambda: captioner.generate_from(features, {"": WORDS}, {"": []})[""]


def main(cfg: Rounds) -> None:
    device = pick_device(cfg.device)
    many = by_device(PHOTOS, device)
    memory = {form: peak_memory(one_form, form, n, device) for form, n in {"plain": 1, "ours bf16": many}.items()}
    sizes = dict.fromkeys(PLAIN, FEW) | {"ours float32": many, "ours bf16": many}
    forms = {form: one_form(form, photos, device) for form, photos in sizes.items()}
    seconds, captions = interleaved(forms, cfg.rounds)
    seconds = {form: seconds[form] / len(captions[form]) for form in forms}
    expected, found = captions["plain"], captions["ours bf16"]
    same = sum(a == b for one, other in zip(expected, found) for a, b in zip(one, other))
    whole = all(len(caption) == WORDS.max_new_tokens for form in captions.values() for caption in form)
    equal = expected == captions["generate"] == captions["generate, merged"] == captions["ours float32"][:FEW]
    plain, generate, merged, float32, bf16 = seconds.values()
    figures = {"speedup_vs_plain": plain / bf16, "speedup_vs_generate": generate / bf16}
    figures |= {"speedup_vs_generate_merged": merged / bf16, "float32_speedup_vs_plain": plain / float32}
    figures |= {"float32_speedup_vs_generate": generate / float32, "bf16_words_equal": same / sum(map(len, expected))}
    figures |= {"distinct_captions": len(set(map(tuple, found))), "peak_memory_plain_mb": memory["plain"] / 1e6}
    figures |= {"peak_memory_ours_mb_a_photo": memory["ours bf16"] / 1e6 / many, "agree": equal and whole}
    report(f"captioning, {WORDS.max_new_tokens} words a photo, seconds a photo", seconds, figures)


if __name__ == "__main__":
    run(main, Rounds)
