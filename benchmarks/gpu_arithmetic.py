"""What to expect of a GPU: operations and bytes of the matrix products, counted, against a card's rates.

    python -m benchmarks.gpu_arithmetic
    python -m benchmarks.gpu_arithmetic --tflops 312 --float32_tflops 19.5 --terabytes 1.6   # an A100 of 40 GB

Nothing is timed: an estimate is the longer of what the operations take at the card's full rate and what the bytes take
at its full bandwidth, each product reading its operands from memory and writing its result there. What lies between the
products is left out, and so are convolutions; attention is counted as written out, while fused attention and a card's
caches move fewer bytes.
"""

import json
from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveFloat
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Products
from benchmarks.p2_training import make_step
from common.config import run
from models.decoder import causal_lm
from models.encoder import EncoderConfig, build_encoder

PROMPT, IMAGE, PHOTOS = 24, 576, 8  # LLaVA-1.5: about what a short prompt takes, its image tokens, photos a batch


@dataclass(frozen=True)
class Config:
    tflops: PositiveFloat = 989.0
    """Dense bf16 rate of the card, in 10^12 operations a second; the default is an H100's."""
    float32_tflops: PositiveFloat = 67.0
    """Its rate in float32, without TF32, as PyTorch has it by default."""
    terabytes: PositiveFloat = 3.35
    """Bandwidth of its memory, in 10^12 bytes a second."""


def encoder() -> Products:
    vit = build_encoder(EncoderConfig(), load_weights=False).to(torch.bfloat16)
    pixels = torch.zeros(1, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    with Products() as products, sdpa_kernel(SDPBackend.MATH):
        vit(pixels)
    return products


def step(form: str) -> Products:
    run_step, captioner, *given = make_step(form, torch.device("cpu"), photos=1)
    causal_lm(captioner.decoder).set_attn_implementation("eager")
    with Products() as products:
        run_step(captioner, *given)
    return products


@torch.no_grad()
def llava(tokens: int, past: int = 0) -> Products:
    """LLaVA-1.5-7B's language model over so many new tokens of each photo of a batch, and its word of the last one."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32064)  # the library's default is Llama 7B
    with torch.device("meta"):
        lm = LlamaForCausalLM(config).to(torch.bfloat16)
        lm.set_attn_implementation("eager")
        cache = DynamicCache(config=config)
        shape = PHOTOS, config.num_key_value_heads, past, config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers if past else 0):
            cache.update(*(torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)), layer)
        words = torch.zeros(PHOTOS, tokens, config.hidden_size, dtype=torch.bfloat16)
        with Products() as products:
            lm(inputs_embeds=words, cache=cache, logits_to_keep=1)
    return products


def main(cfg: Config) -> None:
    plain = "plain step, GPT-2 r=32, a photo's 5 captions, float32"
    jobs = {
        "ViT-L/14, one photo": encoder(),
        plain: step("plain"),
        "our step, GPT-2 r=32, a photo's 5 captions, bf16": step("bf16"),
        f"LLaVA-1.5-7B's language model, prefill of {PHOTOS} photos": llava(PROMPT + IMAGE),
        f"LLaVA-1.5-7B's language model, a word more of {PHOTOS} photos": llava(1, PROMPT + IMAGE),
    }
    print(f"{'':66}{'GFLOP':>10}{'GB':>8}{'estimate, ms':>14}")
    estimates = {}
    for name, products in jobs.items():
        rate = cfg.float32_tflops if name == plain else cfg.tflops
        estimates[name] = 1e3 * max(products.flops / rate, products.bytes / cfg.terabytes) / 1e12
        print(f"{name:66}{products.flops / 1e9:>10,.0f}{products.bytes / 1e9:>8.2f}{estimates[name]:>14.3f}")
    print(json.dumps({"estimate_ms": estimates}))


if __name__ == "__main__":
    run(main, Config)
