"""P2's training step against a plain one, against its own matrix products, and with the encoder in the loop.

    python -m benchmarks.p2_training

Plain, as course solutions do it: one (photo, caption) pair a row, padded, peft's own layers, the attention that
transformers chooses (sdpa), logits at every place, float32; in the loop, ViT-L/14 encodes the photo of each pair in
each step. Ours: what `p2_train.py` runs with `captions_per_row: 5`. Both have the shape of GPT-2 small or
SmolLM2-135M and random weights. A step is forward and backward.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.measure import Products, Rounds, by_device, interleaved, peak_memory, report, write_photos
from common.config import run
from common.device import pick_device
from data.photos import load_photo
from models.captioner import Captioner, CaptionerConfig
from models.decoder import LoraConfig, add_lora
from models.encoder import EncoderConfig, build_encoder
from models.features import encode_files
from models.packing import pack_rows
from models.projector import Projector, ProjectorConfig
from models.training import prepare_training

CAPTIONS, SHORTEST, LONGEST, EOS, IGNORED = 5, 8, 20, 0, -100  # captions of a photo, and how many tokens they have
SHAPES = {"gpt2": (257, 1024, 32), "smollm2": (49, 1280, 16)}  # image tokens, their width, rank of LoRA
PHOTOS = {"gpt2": {"cpu": 2, "cuda": 16}, "smollm2": {"cpu": 8, "cuda": 64}}  # a step
MORE = {"cpu": (), "cuda": (64, 256)}  # photos of larger steps, whose rate is printed
FORMS = {"plain": "plain float32", "float32": "ours float32", "bf16": "ours bf16"}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}


def build(name: str, device: torch.device, plain: bool = False) -> Captioner:
    """A captioner without encoder and tokenizer: random weights, adapters that already change the output.

    GPT-2 computes its GELU in one pass, as `models.decoder` loads it; `plain` as transformers does.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    gpt2 = GPT2Config() if plain else GPT2Config(activation_function="gelu_pytorch_tanh")
    lm = AutoModelForCausalLM.from_config(gpt2 if name == "gpt2" else LlamaConfig(**SMOLLM2))
    _, width, rank = SHAPES[name]
    projector = Projector(ProjectorConfig(), width, lm.get_input_embeddings().embedding_dim)
    decoder = add_lora(lm, LoraConfig(rank=rank, alpha=2 * rank))
    for key, parameter in decoder.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    captioner = Captioner(nn.Identity(), projector, decoder, SimpleNamespace(eos_token_id=EOS), CaptionerConfig())
    return captioner.to(device).train()


def draw(name: str, device: torch.device, photos: int | None = None) -> tuple[Tensor, list[list[list[int]]]]:
    """(photos, P, D_image) random features, and for each photo five random captions of 8 to 20 tokens."""
    rng, (tokens, width, _) = torch.Generator().manual_seed(0), SHAPES[name]
    photos = photos or by_device(PHOTOS[name], device)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (photos, CAPTIONS), generator=rng)
    captions = [[torch.randint(1, 49152, (n,), generator=rng).tolist() for n in row] for row in lengths.tolist()]
    return torch.randn(photos, tokens, width, generator=rng).to(device), captions


def plain_step(captioner: Captioner, features: Tensor, captions: list[list[list[int]]]) -> None:
    """Forward and backward over all pairs; `features` has one row for each pair."""
    captioner.zero_grad()
    device, pairs = features.device, [torch.tensor([EOS, *caption, EOS]) for row in captions for caption in row]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([pair[:-1] for pair in pairs], padding_value=EOS).to(device)
    labels = pad([pair[1:] for pair in pairs], padding_value=IGNORED).to(device)
    image = captioner.projector(features)
    mask = torch.cat([torch.ones(image.shape[:2], device=device), (labels != IGNORED).float()], dim=1)
    inputs = torch.cat([image, captioner.decoder.get_input_embeddings()(ids)], dim=1)
    logits = captioner.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    labels = torch.cat([labels.new_full(image.shape[:2], IGNORED), labels], dim=1)
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()


def our_step(captioner: Captioner, features: Tensor, captions: list[list[list[int]]]) -> None:
    """Forward and backward over all pairs; `features` has one row for each photo."""
    captioner.zero_grad()
    half = next(p for p in captioner.decoder.parameters() if not p.requires_grad).dtype == torch.bfloat16
    with torch.autocast(features.device.type, torch.bfloat16) if half else nullcontext():
        loss, tokens = captioner(features, pack_rows(captions, EOS).to(features.device))
    (loss / tokens).backward()


def one_step(form: str, device: torch.device, name: str = "gpt2") -> partial:
    """A step, plain, float32 or bf16, ready to be called."""
    captioner, (features, captions) = build(name, device, plain=form == "plain"), draw(name, device)
    if form == "plain":
        return partial(plain_step, captioner, features.repeat_interleave(CAPTIONS, dim=0), captions)
    prepare_training(captioner, torch.bfloat16 if form == "bf16" else torch.float32, device)
    return partial(our_step, captioner, features, captions)


def gradients(step: partial) -> dict[str, Tensor]:
    """Do the step; the gradients of its captioner."""
    step()
    return {name: p.grad.clone() for name, p in step.args[0].named_parameters() if p.requires_grad}


def gradient_error(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Relative L2 distance over all trainable parameters together; prints that of the worst tensor."""
    norms = {name: torch.stack([(found[name] - one).norm(), one.norm()]) for name, one in expected.items()}
    worst = max(norms, key=lambda name: norms[name][0] / norms[name][1])
    print(f"worst gradient: {norms[worst][0] / norms[worst][1]:.2e} in {worst}")
    error, size = torch.stack(list(norms.values())).norm(dim=0)
    return (error / size).item()


def time_products(name: str, step: partial, rounds: int, alone: bool = True) -> dict[str, float]:
    """Seconds of a step and, with `alone`, of its matrix products by themselves; prints the rates of both."""
    with Products(keep=alone) as products:
        step()
    forms = {f"{name} step": step} | ({f"{name} products": products.replay} if alone else {})
    seconds, _ = interleaved(forms, rounds)
    rates = [f"{products.flops / value / 1e9:.0f} GFLOP/s" for value in seconds.values()]
    speed = len(step.args[2]) * CAPTIONS / seconds[f"{name} step"]
    print(f"{name}: {speed:.0f} captions/s; {products.count} products at {' in the step, alone '.join(rates)}")
    return seconds


def time_in_loop(plain: partial, ours: partial, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a plain step with ViT-L/14 before it, and of our step with the encoder's output from the cache."""
    encoder, captions = build_encoder(EncoderConfig(weights="random")).to(device), ours.args[2]
    with TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), len(captions), 224, 224)
        cached, *_ = encode_files(encoder, photos, Path(folder))
        pixels = [encoder.transform(load_photo(photo).image) for photo in photos for _ in range(CAPTIONS)]
        pairs = torch.stack(pixels).to(device)
        forms = {"encoder in the loop, plain": lambda: plain_step(plain.args[0], encoder(pairs), captions)}
        read = partial(cached.__getitem__, range(len(photos)))
        forms["features cached, ours bf16"] = lambda: our_step(ours.args[0], read().to(device), captions)
        return interleaved(forms, rounds)[0]


def main(cfg: Rounds) -> None:
    device = pick_device(cfg.device)
    memory = {form: peak_memory(one_step, form, device) for form in FORMS}
    steps = {form: one_step(form, device) for form in FORMS}
    seconds, grads = interleaved({name: partial(gradients, steps[form]) for form, name in FORMS.items()}, cfg.rounds)
    errors = {form: gradient_error(grads["plain float32"], grads[f"ours {form}"]) for form in ("float32", "bf16")}
    seconds |= time_products("gpt2", steps["bf16"], cfg.rounds)
    seconds |= time_products("smollm2", one_step("bf16", device, "smollm2"), cfg.rounds)
    seconds |= time_in_loop(steps["plain"], steps["bf16"], device, cfg.rounds)
    for photos in by_device(MORE, device):
        step = partial(our_step, steps["bf16"].args[0], *draw("gpt2", device, photos))
        time_products(f"{photos} photos", step, cfg.rounds, alone=False)

    plain, float32, bf16 = (seconds[name] for name in FORMS.values())
    figures = {"float32_speedup": plain / float32, "float32_gradient_error": errors["float32"]}
    figures |= {"bf16_speedup": plain / bf16, "bf16_gradient_error": errors["bf16"]}
    for name in SHAPES:
        figures[f"step_over_matmul_{name}"] = seconds[f"{name} step"] / seconds[f"{name} products"]
    in_loop, cached = list(seconds.values())[-2:]
    figures |= {"encoder_in_loop_speedup": in_loop / cached, "peak_memory_ratio": memory["bf16"] / memory["plain"]}
    figures |= {"peak_memory_ratio_float32": memory["float32"] / memory["plain"]}
    agree = errors["float32"] <= 1e-5 and errors["bf16"] <= 0.02
    figures |= {"peak_memory_plain_mb": memory["plain"] / 1e6, "agree": agree}
    size = f"{by_device(PHOTOS['gpt2'], device)} photos, {CAPTIONS} captions each, {SHAPES['gpt2'][0]} image tokens"
    report(f"training step, {size}", seconds, figures)


if __name__ == "__main__":
    run(main, Rounds)
