"""Sampling by a generator a photo: what is drawn for a photo depends on its own seed and nothing beside it.

transformers draws a batch's words from one global generator, so that a caption changes with the batch size, the order
of the photos and where a run was resumed. Here each row has its own, and greedy choice does the rest: the arg max of
log-probabilities plus Gumbel noise is a draw from their distribution (Gumbel 1954; Maddison et al. 2014).
"""

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models.captioner import Decoding


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
