"""The language model that writes captions, LoRA on each of its linear layers, and merging the two again."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, restricted_number_type
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from common.config import UserError
from models import packaged
from models.hub import load_whole, loading, means_folder

IntFrom1To16384 = restricted_number_type("IntFrom1To16384", int, [(">=", 1), ("<=", 2**14)])  # no decoder is wider


@dataclass(frozen=True)
class DecoderConfig:
    """Which causal language model writes the caption."""

    model: str = "gpt2"
    """Hub id, local folder, or pip:PACKAGE."""
    start_token: bool = False
    """Put the decoder's own first token before the image, as in its pretraining: attention can rest on it."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685) on every linear layer of the decoder, its output head included."""

    rank: IntFrom1To16384 = 32
    """Rank of each update."""
    alpha: PositiveFloat = 64.0
    """The update is scaled by alpha / rank."""
    dropout: ClosedUnitInterval = 0.0
    """Dropout on the input of each update."""


def check_decoder(config: DecoderConfig) -> list[str]:
    """What can be seen to be wrong with `config` before any weights are read; UserError for a packaged file."""
    if config.model.startswith(packaged.PREFIX):
        packaged.packaged_file("decoder.model", config.model)
    elif means_folder(config.model) and not os.path.isfile(f"{config.model}/config.json"):
        return [f"decoder.model: {Path(config.model)}: no such model folder, found no config.json in it"]
    return []


def load_decoder(config: DecoderConfig, load_weights: bool = True) -> tuple[nn.Module, object]:
    """The causal LM in float32 and its tokenizer; without `load_weights` on the meta device and without tokenizer.

    Raises UserError where the model cannot be loaded, or where its tokenizer names no end-of-text token.
    """
    where, options = config.model, {}
    if where.startswith(packaged.PREFIX):
        file = packaged.packaged_file("decoder.model", where)
        where, options = str(file.parent), {"gguf_file": file.name}
    with loading(f"decoder.model: could not load {config.model}", os.path.exists(where)):
        options |= {"config": _shape(where, load_weights, options)}
        if not load_weights:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(options["config"]), None
        lm = load_whole(f"decoder.model: {config.model}", AutoModelForCausalLM, where, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    if tokenizer.eos_token_id is None:
        raise UserError(f"decoder.model: the tokenizer of {config.model} has no end-of-text token")
    _check_head(lm)
    lm.generation_config = GenerationConfig()  # greedy means greedy, whatever penalties the model's authors set
    return lm, tokenizer


@lru_cache(maxsize=1)
def _gguf_config(folder: str, gguf_file: str):
    return AutoConfig.from_pretrained(folder, gguf_file=gguf_file)  # it reads the whole file, which takes seconds


def _shape(where: str, load_weights: bool, options: dict):
    """A model's configuration, with GPT-2's GELU in one pass over its input where the library takes eight."""
    if options:
        return copy.deepcopy(_gguf_config(where, **options))
    # the library's default configuration is GPT-2 small: its size needs no hub
    offline = not load_weights and where == "gpt2" and not os.path.isdir(where)
    shape = GPT2Config() if offline else AutoConfig.from_pretrained(where, trust_remote_code=False)
    if getattr(shape, "activation_function", None) == "gelu_new":
        shape.activation_function = "gelu_pytorch_tanh"  # the same function
    return shape


def _check_head(lm: nn.Module) -> None:
    """The loss applies the output head by itself: refuse a decoder that does more after its last layer."""
    ids = torch.arange(2)[None]
    with torch.no_grad():
        hidden = lm.base_model(input_ids=ids).last_hidden_state
        if not torch.allclose(lm.get_output_embeddings()(hidden), lm(input_ids=ids).logits, atol=1e-4):
            raise UserError(f"decoder.model: {type(lm).__name__} changes its logits after the head: not supported")


def linear_layers(lm: nn.Module) -> list[str]:
    """Names of all linear layers, output head included (GPT-2 writes its blocks' as Conv1D)."""
    return [name for name, module in lm.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def add_lora(lm: nn.Module, config: LoraConfig) -> nn.Module:
    """Wrap `lm` with fresh adapters in float32; everything else is frozen. Returns peft's PeftModel."""
    import peft

    sizes = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    settings = peft.LoraConfig(target_modules=linear_layers(lm), task_type="CAUSAL_LM", **sizes)
    with warnings.catch_warnings(action="ignore"):  # tied head and Conv1D: both meant, both tested
        return peft.get_peft_model(lm, settings)


def causal_lm(decoder: nn.Module) -> nn.Module:
    """The transformers model inside `decoder`, whether wrapped by peft or not."""
    return decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder


@contextmanager
def attend_with(lm: nn.Module, implementation: str, after: str) -> Iterator[None]:
    """Let a transformers model attend by this implementation of the library's; when the block ends, by `after`.

    The caller names both, because the library has no public way to ask which one is set.
    """
    lm.set_attn_implementation(implementation)
    try:
        yield
    finally:
        lm.set_attn_implementation(after)


def merge_lora(decoder: nn.Module) -> nn.Module:
    """Fold the adapters into the weights and return the plain transformers model.

    A head tied to the word embeddings is untied first: its update belongs to the head alone.
    """
    lm = causal_lm(decoder)
    head, words = lm.get_output_embeddings(), lm.get_input_embeddings()
    base = getattr(head, "base_layer", head)
    if base.weight is words.weight:
        base.weight = nn.Parameter(words.weight.detach().clone(), requires_grad=False)
        lm.config.tie_word_embeddings = False
    return decoder.merge_and_unload()


class LoraProduct(torch.autograd.Function):
    """`x W + bias + scale (x A) B` in matrix products alone.

    peft writes each sum and each scaling as a pass of its own over (N, out), forward and backward; at a decoder's
    widths those passes cost as much as the products. Same mathematics, same parameters.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale: float):
        """x (..., in), weight (in, out), bias (out) or None, a (rank, in), b (out, rank) -> (..., out)"""
        flat = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype) * scale
        low = flat @ a.T
        out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        out.addmm_(low, b.T)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, low, weight, a, b = ctx.saved_tensors
        shape, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_x = torch.addmm(grad @ weight.T, grad_low, a).view(*shape, -1) if ctx.needs_input_grad[0] else None
        grad_a = (grad_low.T @ flat).float()  # the adapters are kept in float32
        grad_b = (grad.T @ low).float() * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None


def fuse_lora(decoder: nn.Module) -> None:
    """Let each adapted layer compute by LoraProduct; layers with dropout keep peft's own form."""
    from peft.tuners.lora import Linear

    for module in decoder.modules():
        if isinstance(module, Linear):
            (name,) = module.active_adapters
            if isinstance(module.lora_dropout[name], nn.Identity):
                module.forward = partial(_fused_forward, module, name)


def _fused_forward(module: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    base = module.get_base_layer()
    if module.disable_adapters:
        return base(x)
    weight = base.weight.T if isinstance(base, nn.Linear) else base.weight  # Conv1D keeps (in, out)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    # autocast on CUDA computes layer norms in float32 and hands that on
    return LoraProduct.apply(x.to(weight.dtype), weight, base.bias, a, b, module.scaling[name])
