"""How a caption is written: the settings, sampling with a generator for each photo, several decodings from one prefill.

transformers draws the words of a batch from one global generator. A caption then changes with the batch size, with the
order of the photos and with the place where a run was resumed. Here each row has random numbers of its own, one for
each word, and `generate` only has to take the one word that the sampler left.
"""

import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, generation
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from models.decoder import attend_with

# transformers calls the argument `cache` from 5.24 on, and `past_key_values` before.
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
TokenIds = list[int]
Seeds = dict[str, Sequence[int]]  # one for each photo, by the name of the decoding


@dataclass(frozen=True)
class Decoding:
    """How a caption is chosen; the default is greedy."""

    max_new_tokens: PositiveInt = 50
    """Longest caption, in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """Shortest caption, in tokens: before, the end token is not chosen."""
    num_beams: PositiveInt = 1
    """Beams of the beam search; 1 is greedy or sampling."""
    length_penalty: float = 1.0
    """Beams are compared by their log-probability over length to this power: above 0 favours longer captions."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes tokens that are already there less likely (arXiv 1909.05858), a VLM's prompt included."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """No n-gram of so many tokens comes twice, a VLM's prompt included; 0 allows all."""
    do_sample: bool = False
    """Draw each word at random instead of taking the likeliest."""
    temperature: PositiveFloat = 1.0
    """Divides the logits before sampling."""
    top_p: ClosedUnitInterval = 1.0
    """Sample from the likeliest words that make up this share of the probability."""
    top_k: NonNegativeInt = 0
    """Sample from this many likeliest words; 0 is all."""


Decodings = dict[str, Decoding]

# The three decodings of the published report.
PRESETS = {
    "best": Decoding(),
    "moderate": Decoding(do_sample=True, temperature=0.7, top_p=0.9, top_k=50),
    "diverse": Decoding(do_sample=True, temperature=0.9, top_p=0.95, top_k=100),
}


def check_decoding(key: str, decoding: Decoding) -> list[str]:
    """What is wrong with a decoding's settings taken together; `key` is the name of the setting."""
    problems = []
    if decoding.do_sample and decoding.num_beams > 1:
        problems.append(f"{key}.num_beams: expected 1 with do_sample, got {decoding.num_beams}")
    if decoding.length_penalty != 1 and decoding.num_beams == 1:
        problems.append(f"{key}.length_penalty: only beams use it; expected {key}.num_beams with it")
    for name in ("temperature", "top_p", "top_k"):
        if not decoding.do_sample and getattr(decoding, name) != getattr(Decoding(), name):
            problems.append(f"{key}.{name}: only sampling uses it; expected {key}.do_sample with it")
    return problems


# ------------------------------------------------------------------------------------------- samplers


def photo_seed(*parts: object) -> int:
    """A seed of 63 bits from, for example, (seed, decoding, photo)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


class InverseTransform(LogitsProcessor):
    """Leaves each row one word, drawn from the row's distribution by inverse transform sampling (Devroye 1986).

    A row's numbers are drawn on the CPU, so that a seed means the same on every device. One number a word is little
    work even for many rows; noise for the whole vocabulary would make a GPU wait.
    """

    def __init__(self, seeds: Sequence[int], steps: int):
        rows = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.numbers = iter(torch.stack(rows, dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L) ids, (B, V) logits -> (B, V): 0 for the word that was drawn, -inf for all others"""
        shares = scores.float().softmax(dim=-1)
        shares = shares.cpu() if shares.device.type == "mps" else shares  # MPS knows no float64
        shares = shares.cumsum(dim=-1, dtype=torch.float64)  # or rounding would give a share to words that have none
        numbers = next(self.numbers).to(shares.device)[:, None]
        drawn = torch.searchsorted(shares, numbers * shares[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn.to(scores.device), 0.0)


def processors(decoding: Decoding, seeds: Sequence[int], prompt: Tensor, eos: list[int]) -> LogitsProcessorList:
    """What `decoding` does to the logits of the words after `prompt` (B, L), in transformers' own order.

    First the rules against repetition and short captions; then, where it samples, what turns greedy generation into
    sampling.
    """
    longer = partial(generation.MinNewTokensLengthLogitsProcessor, prompt.shape[1], eos_token_id=eos)
    draws = decoding.do_sample
    steps = (
        (decoding.repetition_penalty != 1, generation.RepetitionPenaltyLogitsProcessor, decoding.repetition_penalty),
        (decoding.no_repeat_ngram_size > 0, generation.NoRepeatNGramLogitsProcessor, decoding.no_repeat_ngram_size),
        (decoding.min_new_tokens > 0, partial(longer, device=prompt.device), decoding.min_new_tokens),
        (draws and decoding.temperature != 1, generation.TemperatureLogitsWarper, decoding.temperature),
        (draws and decoding.top_k > 0, generation.TopKLogitsWarper, decoding.top_k),
        (draws and decoding.top_p < 1, generation.TopPLogitsWarper, decoding.top_p),
        (draws, partial(InverseTransform, steps=decoding.max_new_tokens), seeds),
    )
    return LogitsProcessorList(step(setting) for wanted, step, setting in steps if wanted)


class Interleaved(LogitsProcessor):
    """Processors of K decodings for interleaved rows: row 0 goes to the first, row 1 to the second, and so on.

    They do not see the first `hidden` ids.
    """

    def __init__(self, processors: Sequence[LogitsProcessorList], hidden: int = 0):
        self.processors, self.hidden = processors, hidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B * K, L) ids, (B * K, V) logits -> (B * K, V)"""
        count, scores = len(self.processors), scores.float()
        ids = input_ids[:, self.hidden :]
        rows = [process(ids[k::count], scores[k::count]) for k, process in enumerate(self.processors)]
        return torch.stack(rows, dim=1).flatten(0, 1)


def generation_config(decoding: Decoding, eos: list[int]) -> GenerationConfig:
    """What transformers' `generate` is told, besides the samplers."""
    own = {name: getattr(decoding, name) for name in ("max_new_tokens", "num_beams", "length_penalty")}
    # the samplers draw; and a GPU would compile a cache of fixed size anew for every batch shape
    own |= {"do_sample": False, "disable_compile": True}
    # padding stands behind an end token, and `until_eos` cuts it off
    return GenerationConfig(eos_token_id=eos, pad_token_id=eos[0], **own)


def until_eos(ids: Tensor, eos: list[int]) -> list[TokenIds]:
    """(B, L) generated ids -> each row's up to its first end token, without it.

    >>> until_eos(torch.tensor([[5, 6, 0, 0], [7, 8, 9, 10]]), eos=[0])
    [[5, 6], [7, 8, 9, 10]]
    """
    return [list(itertools.takewhile(lambda token: token not in eos, row)) for row in ids.tolist()]


# ------------------------------------------------------------------------------------------- from one prefill


def prefill(model: nn.Module, **inputs) -> Cache:
    """Run `model` (a transformers model without its head) over a prompt: its keys and values."""
    cache = DynamicCache(config=model.config)
    model(**inputs, **{CACHE: cache}, use_cache=True)
    return cache


def fixed_cache(parts: Sequence[Cache], repeats: int, room: int) -> Cache:
    """Join the caches of a batch's parts, which are used up; each row comes `repeats` times in succession.

    transformers' DynamicLayer copies all that it holds for each new token. The StaticLayers here have room for `room`
    tokens more and write each in its place. Layers with a sliding window stay of their own kind.
    """
    cache = parts[0]
    for number, layers in enumerate(zip(*(part.layers for part in parts))):
        keys = torch.cat([layer.keys for layer in layers]).repeat_interleave(repeats, dim=0)
        values = torch.cat([layer.values for layer in layers]).repeat_interleave(repeats, dim=0)
        for used in layers[1:]:
            used.reset()  # its memory is free for the next layer
        if type(layers[0]) is DynamicLayer:
            cache.layers[number] = StaticLayer(max_cache_len=keys.shape[2] + room)
            cache.layers[number].update(keys, values)
        else:
            layers[0].keys, layers[0].values = keys, values
    return cache


@torch.inference_mode()
def generate_all(
    model: nn.Module,
    caches: list[Cache],
    ids: Tensor,
    decodings: Decodings,
    seeds: Seeds,
    eos: list[int],
    hidden: int = 0,
    **rows: Tensor,
) -> dict[str, list[TokenIds]]:
    """Several decodings of B prompts from one prefill: token ids of the B captions of each, without EOS.

    `caches` hold, part by part of the batch, what `model` keeps of `ids` (B, L) but for the last; they are used up.
    Decodings with the same number of steps go side by side as rows of one batch: a step reads the weights once for all
    of them. The first `hidden` of the `ids` stand for an image: the rules against repetition do not see them. On a CPU
    the language model attends by plain products, since the fused kernel is made for many queries: at 64 rows of 270
    tokens in bf16 they take a fifth of its time. `rows` are what else `generate` reads, (..., B, L), such as the mask.
    """
    groups: dict[tuple, list[str]] = {}
    for name, decoding in decodings.items():
        groups.setdefault((decoding.max_new_tokens, name if decoding.num_beams > 1 else None), []).append(name)
    captions = {}
    for number, names in enumerate(groups.values(), start=1):
        count, first = len(names), decodings[names[0]]
        parts = caches if number == len(groups) else copy.deepcopy(caches)
        steps = [processors(decodings[name], seeds[name], ids[:, hidden:], eos) for name in names]
        with attend_with(model.get_decoder(), "eager" if ids.device.type == "cpu" else "sdpa", after="sdpa"):
            out = model.generate(
                input_ids=ids.repeat_interleave(count, dim=0),
                **{name: value.repeat_interleave(count, dim=-2) for name, value in rows.items()},
                generation_config=generation_config(first, eos),
                logits_processor=LogitsProcessorList([Interleaved(steps, hidden)]),
                **{CACHE: fixed_cache(parts, count * first.num_beams, first.max_new_tokens)},
            )
        new = until_eos(out[:, ids.shape[1] :], eos)  # by position: words of a prompt may come back in a caption
        captions |= {name: new[place::count] for place, name in enumerate(names)}
    return captions


def generate_plainly(
    model: nn.Module, inputs: dict[str, Tensor], decoding: Decoding, seeds: Sequence[int], eos: list[int]
) -> list[TokenIds]:
    """Captions by transformers' `generate` alone, which every family has, Q-Formers and encoder-decoders too."""
    begun = inputs["input_ids"][:, : 1 if model.config.is_encoder_decoder else None]  # what the decoder starts with
    config, steps = generation_config(decoding, eos), processors(decoding, seeds, begun, eos)
    out = model.generate(**inputs, generation_config=config, logits_processor=steps)
    length = inputs["input_ids"].shape[1]
    begins = length if out[:, :length].equal(inputs["input_ids"]) else int(model.config.is_encoder_decoder)
    return until_eos(out[:, begins:], eos)  # behind the prompt, or behind the token that starts a decoder
