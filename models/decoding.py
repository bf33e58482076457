"""How a caption is written: decoding settings, samplers by a generator a photo, and the cache of keys and values.

transformers draws a batch's words from one global generator, so that a caption changes with the batch size, the order
of the photos and where a run was resumed. Here each row has its own, and greedy choice does the rest: the arg max of
log-probabilities plus Gumbel noise is a draw from their distribution (Gumbel 1954; Maddison et al. 2014).

transformers' DynamicCache copies all that it holds for each new token, into fresh memory each time; its StaticLayer
writes a token in its place. It wants to know how many will come, which a captioner knows.
"""

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models.decoder import attending


@dataclass(frozen=True)
class Decoding:
    """How a caption is chosen; the default is greedy."""

    max_new_tokens: PositiveInt = 50
    """Longest caption, in tokens."""
    num_beams: PositiveInt = 1
    """Beams of the beam search; 1 is greedy or sampling."""
    do_sample: bool = False
    """Draw words at random instead of taking the likeliest."""
    temperature: PositiveFloat = 1.0
    """Divides the logits before sampling."""
    top_p: ClosedUnitInterval = 1.0
    """Sample from the likeliest words that make up this share of the probability."""
    top_k: NonNegativeInt = 0
    """Sample from this many likeliest words; 0 is all."""


def check_decoding(key: str, decoding: Decoding) -> list[str]:
    """What is wrong with a decoding's settings taken together; `key` is the name of the setting."""
    problems = []
    if decoding.do_sample and decoding.num_beams > 1:
        problems.append(f"{key}.num_beams: expected 1 with do_sample, got {decoding.num_beams}")
    if decoding.top_p == 0:
        problems.append(f"{key}.top_p: expected more than 0, got 0")
    for name in ("temperature", "top_p", "top_k"):
        if not decoding.do_sample and getattr(decoding, name) != getattr(Decoding(), name):
            problems.append(f"{key}.{name}: is of sampling alone; expected {key}.do_sample with it")
    return problems


def photo_seed(*parts: object) -> int:
    """A seed of 63 bits from (seed, preset, photo), say."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


class GumbelNoise(LogitsProcessor):
    """Add to each row's scores the Gumbel noise of that row's generator."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L) ids, (B, V) logits -> (B, V)"""
        # on the CPU, so that a seed draws the same on every device; exponential draws e give Gumbel ones by -log e
        draws = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores.float() - draws.log().to(scores.device)


def samplers(decoding: Decoding, seeds: Sequence[int]) -> LogitsProcessorList:
    """What turns greedy generation into sampling as `decoding` says; empty where it does not sample."""
    if not decoding.do_sample:
        return LogitsProcessorList()
    chosen: list[LogitsProcessor] = []
    if decoding.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k:
        chosen.append(TopKLogitsWarper(int(decoding.top_k)))
    if decoding.top_p < 1.0:
        chosen.append(TopPLogitsWarper(float(decoding.top_p)))
    return LogitsProcessorList([*chosen, GumbelNoise(seeds)])


class InTurn(LogitsProcessor):
    """Processors of K decodings for rows in turn: row 0 goes to the first, row 1 to the second, ..."""

    def __init__(self, own: Sequence[LogitsProcessorList]):
        self.own = own

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B * K, L) ids, (B * K, V) logits -> (B * K, V)"""
        count, scores = len(self.own), scores.float()
        rows = [own(input_ids[k::count], scores[k::count]) for k, own in enumerate(self.own)]
        return torch.stack(rows, dim=1).flatten(0, 1)


def generation_config(decoding: Decoding, eos: int | list[int], pad: int) -> GenerationConfig:
    """What transformers' `generate` is told, besides the samplers."""
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=False,  # the samplers draw
        eos_token_id=eos,
        pad_token_id=pad,
        disable_compile=True,  # a cache of fixed size would have a GPU compile anew for every batch shape
    )


def until_eos(ids: Tensor, eos: int | list[int]) -> list[list[int]]:
    """(B, L) generated ids -> each row's up to its first end token, without it.

    >>> until_eos(torch.tensor([[5, 6, 0, 0], [7, 8, 9, 10]]), eos=0)
    [[5, 6], [7, 8, 9, 10]]
    """
    ends = {eos} if isinstance(eos, int) else set(eos)
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in ids.tolist()]


# ------------------------------------------------------------------------------------------- keys and values


def with_room(parts: Sequence[Cache], repeats: int, more: int) -> Cache:
    """Join the caches of a batch's parts, which are used up, with room for `more` tokens behind what they hold.

    Each row comes `repeats` times in succession. Layers with a sliding window stay of their own kind.
    """
    cache = parts[0]
    for number, layers in enumerate(zip(*(part.layers for part in parts))):
        layer, length = layers[0], layers[0].keys.shape[2]
        room = more if type(layer) is DynamicLayer else 0
        keys = _joined([one.keys for one in layers], repeats, room)
        values = _joined([one.values for one in layers], repeats, room)
        if room:
            layer = StaticLayer(max_cache_len=length + room)
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            layer.cumulative_length = torch.tensor(length, device=keys.device)
        layer.keys, layer.values = keys, values
        cache.layers[number] = layer
        for used in layers[1:]:
            used.reset()  # its memory is free for the next layer
    return cache


def _joined(parts: Sequence[Tensor], repeats: int, room: int) -> Tensor:
    """Tensors (B_i, heads, length, width) -> (sum of B_i * repeats, heads, length + room, width)"""
    _, heads, length, width = parts[0].shape
    joined = parts[0].new_empty(sum(map(len, parts)) * repeats, heads, length + room, width)
    joined[:, :, length:] = 0  # hidden by the mask, but a NaN there would show through
    start = 0
    for part in parts:
        rows = joined[start : start + len(part) * repeats]
        rows.unflatten(0, (len(part), repeats))[..., :length, :] = part[:, None]
        start += len(rows)
    return joined


def one_query_attention(lm: nn.Module) -> AbstractContextManager[None]:
    """Attention for a new token a row: on a CPU by plain products, the fused kernel being made for many queries.

    At 64 rows of 270 tokens in bf16 these take a fifth of its time.
    """
    return attending(lm, "eager" if lm.device.type == "cpu" else lm.config._attn_implementation)
