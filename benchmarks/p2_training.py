"""P2's training step against a plain one, against its own matrix products, and with the encoder in the loop.

    python -m benchmarks.p2_training

Plain, as course solutions do it: a (photo, caption) pair a row, padded, peft's own layers, the attention that
transformers chooses (sdpa), logits at every place, float32; in the loop, ViT-L/14 encodes each pair's photo each time.
Ours: what `p2_train.py` runs with `captions_per_row: 5`. GPT-2 small and SmolLM2-135M by shape, random weights; a step
is forward and backward.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import Products, Rounds, interleaved, peak_memory, report
from common.config import run
from common.device import pick_device, seed_everything
from data.features import FeatureCache
from data.photos import Photo
from models.captioner import Captioner
from models.decoder import LoraConfig, add_lora
from models.encoder import EncoderConfig, build_encoder
from models.packing import pack_rows
from models.projector import Projector, ProjectorConfig
from models.training import prepare_training

CAPTIONS, SHORTEST, LONGEST, EOS = 5, 8, 20, 0  # a photo's captions, and their tokens


# image tokens, width of an image token, rank of LoRA, photos a step on a CPU and on a GPU
SHAPES = {"gpt2": (257, 1024, 32, {"cpu": 2, "cuda": 16}), "smollm2": (49, 1280, 16, {"cpu": 8, "cuda": 64})}
FULL = (16, 64, 256)  # photos a bf16 step on a GPU, whose rate is told


def build(name: str, device: torch.device) -> Captioner:
    """A captioner without encoder and tokenizer: random weights, adapters that already change something."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    seed_everything(0)
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    smollm2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    lm = AutoModelForCausalLM.from_config(GPT2Config() if name == "gpt2" else LlamaConfig(**smollm2))
    _, width, rank, _ = SHAPES[name]
    projector = Projector(ProjectorConfig(), width, lm.get_input_embeddings().embedding_dim)
    decoder = add_lora(lm, LoraConfig(rank=rank, alpha=2 * rank))
    for key, parameter in decoder.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    captioner = Captioner(nn.Identity(), projector, decoder, SimpleNamespace(eos_token_id=EOS), None).to(device)
    return captioner.train()


def draw(name: str, device: torch.device, photos: int | None = None) -> tuple[Tensor, list[list[list[int]]]]:
    """(photos, P, D_image) random features, and five random captions of 8 to 20 tokens a photo."""
    rng = torch.Generator().manual_seed(0)
    tokens, width, _, usual = SHAPES[name]
    photos = photos or usual.get(device.type, 2)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (photos, CAPTIONS), generator=rng)
    captions = [[torch.randint(1, 49152, (n,), generator=rng).tolist() for n in row] for row in lengths.tolist()]
    return torch.randn(photos, tokens, width, generator=rng).to(device), captions


def plain_step(captioner: Captioner, features: Tensor, captions: list[list[list[int]]]) -> None:
    """Forward and backward over all pairs; `features` holds a row a pair."""
    captioner.zero_grad()
    pairs = [[EOS, *caption, EOS] for row in captions for caption in row]
    longest = max(map(len, pairs)) - 1
    device = features.device
    ids = torch.tensor([pair[:-1] + [EOS] * (longest + 1 - len(pair)) for pair in pairs], device=device)
    labels = torch.tensor([pair[1:] + [-100] * (longest + 1 - len(pair)) for pair in pairs], device=device)
    image = captioner.projector(features)
    mask = torch.cat([torch.ones(image.shape[:2], device=device), (labels != -100).float()], dim=1)
    inputs = torch.cat([image, captioner.decoder.get_input_embeddings()(ids)], dim=1)
    logits = captioner.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    labels = torch.cat([labels.new_full(image.shape[:2], -100), labels], dim=1)
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()


def our_step(captioner: Captioner, features: Tensor, captions: list[list[list[int]]]) -> None:
    """Forward and backward over all pairs; `features` holds a row a photo."""
    captioner.zero_grad()
    half = next(p for p in captioner.decoder.parameters() if not p.requires_grad).dtype == torch.bfloat16
    with torch.autocast(features.device.type, torch.bfloat16) if half else nullcontext():
        loss, tokens = captioner(features, pack_rows(captions, EOS).to(features.device))
    (loss / tokens).backward()


def gradients(captioner: Captioner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in captioner.named_parameters() if p.requires_grad}


def gradient_error(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Relative L2 distance over all trainable parameters joined; prints the worst tensor's."""
    squares = {name: ((found[name] - one).square().sum(), one.square().sum()) for name, one in expected.items()}
    worst = max(squares, key=lambda name: squares[name][0] / squares[name][1])
    error, size = squares[worst]
    print(f"worst gradient: {(error / size).sqrt():.2e} in {worst}")
    errors, sizes = (torch.stack(column).sum() for column in zip(*squares.values()))
    return (errors / sizes).sqrt().item()


def matmul_share(name: str, captioner: Captioner, features: Tensor, captions: list, rounds: int) -> dict[str, float]:
    """Seconds of our step and of its matrix products alone, by name; prints the rate of the products."""
    with Products(keep=True) as products:
        our_step(captioner, features, captions)
    forms = {"step": lambda: our_step(captioner, features, captions), "products": products.replay}
    seconds, _ = interleaved({f"{name} {form}": call for form, call in forms.items()}, rounds)
    step, alone = seconds.values()
    print(
        f"{name}: {products.count} products of {products.flops / 1e9:.0f} GFLOP, alone at "
        f"{products.flops / alone / 1e9:.0f} GFLOP/s; the step runs at {alone / step:.0%} of that"
    )
    return seconds


def rate(captioner: Captioner, features: Tensor, captions: list, rounds: int) -> None:
    """Print how many captions a second a bf16 step of this size trains, and how many products a second."""
    with Products() as products:
        our_step(captioner, features, captions)
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = interleaved({f"{len(captions)} photos": lambda: our_step(captioner, features, captions)}, rounds)
    (step,) = seconds.values()
    print(
        f"{len(captions)} photos a step: {len(captions) * CAPTIONS / step:.0f} captions/s, "
        f"{products.flops / step / 1e12:.0f} TFLOP/s of products, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    )


def make_step(form: str, device: torch.device, photos: int | None = None) -> tuple[Callable, Captioner, Tensor, list]:
    """A step of GPT-2's shape, plain, float32 or bf16, and what it is called with."""
    captioner, (features, captions) = build("gpt2", device), draw("gpt2", device, photos)
    if form == "plain":
        return plain_step, captioner, features.repeat_interleave(CAPTIONS, dim=0), captions
    prepare_training(captioner, torch.bfloat16 if form == "bf16" else torch.float32, device)
    return our_step, captioner, features, captions


def one_step(form: str, device: torch.device) -> Callable[[], None]:
    """The same, ready to be called, for its memory."""
    return partial(*make_step(form, device))


def main(cfg: Rounds) -> None:
    device = pick_device(cfg.device)
    memory = {form: peak_memory(one_step, form, device) for form in ("plain", "float32", "bf16")}

    made = {form: make_step(form, device) for form in memory}

    def stepped(step: Callable, captioner: Captioner, *given) -> dict[str, Tensor]:
        step(captioner, *given)
        return gradients(captioner)

    names = {"plain": "plain float32", "float32": "ours float32", "bf16": "ours bf16"}
    seconds, grads = interleaved({names[form]: partial(stepped, *made[form]) for form in made}, cfg.rounds)
    errors = {form: gradient_error(grads["plain float32"], grads[f"ours {form}"]) for form in ("float32", "bf16")}
    _, bf16, features, captions = made["bf16"]
    seconds |= matmul_share("gpt2", bf16, features, captions, cfg.rounds)
    smollm2 = build("smollm2", device)
    prepare_training(smollm2, torch.bfloat16, device)
    seconds |= matmul_share("smollm2", smollm2, *draw("smollm2", device), cfg.rounds)
    seconds |= in_loop(made["plain"][1], bf16, captions, device, cfg.rounds)
    if device.type == "cuda":
        del made, smollm2, grads
        for photos in FULL:
            rate(bf16, *draw("gpt2", device, photos), cfg.rounds)

    report(
        f"training step, {len(captions)} photos, {CAPTIONS} captions each, {SHAPES['gpt2'][0]} image tokens",
        seconds,
        float32_speedup=seconds["plain float32"] / seconds["ours float32"],
        float32_gradient_error=errors["float32"],
        bf16_speedup=seconds["plain float32"] / seconds["ours bf16"],
        bf16_gradient_error=errors["bf16"],
        step_over_matmul_gpt2=seconds["gpt2 step"] / seconds["gpt2 products"],
        step_over_matmul_smollm2=seconds["smollm2 step"] / seconds["smollm2 products"],
        encoder_in_loop_speedup=seconds["encoder in the loop, plain"] / seconds["features cached, ours bf16"],
        peak_memory_ratio=memory["bf16"] / memory["plain"],
        peak_memory_ratio_float32=memory["float32"] / memory["plain"],
        peak_memory_plain_mb=memory["plain"] / 1e6,
        agree=errors["float32"] <= 1e-5 and errors["bf16"] <= 0.02,
    )


def in_loop(
    plain: Captioner, ours: Captioner, captions: list[list[list[int]]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Seconds of a plain step with ViT-L/14 before it, and of ours with its output read from the cache."""
    encoder = build_encoder(EncoderConfig(weights="random")).to(device)
    with TemporaryDirectory() as folder:
        photos = []
        for number in range(len(captions)):
            pixels = torch.randint(256, (224, 224, 3), dtype=torch.uint8)
            path = Path(folder) / f"{number}.png"
            Image.fromarray(pixels.numpy()).save(path)
            photos.append(Photo(path.stem, path, ()))
        cached, indices, _ = FeatureCache(encoder, Path(folder)).find(photos)
        pixels = torch.stack([encoder.transform(Image.open(photo.path)) for photo in photos]).to(device)
        pairs = pixels.repeat_interleave(CAPTIONS, dim=0)
        forms = {
            "encoder in the loop, plain": lambda: plain_step(plain, encoder(pairs), captions),
            "features cached, ours bf16": lambda: our_step(ours, cached[indices].to(device), captions),
        }
        return interleaved(forms, rounds)[0]


if __name__ == "__main__":
    run(main, Rounds)
