"""Attention records: which image patches each token of a caption attended to, from one pass over the caption.

Captions are generated in sdpa attention with a cache. Then the caption is read once more by an attention function that
calls sdpa too, and also computes the softmax of the caption's rows and keeps the image's columns of it, averaged over
heads. `output_attentions=True` would keep every row and column of every head, in eager attention, which changes
captions. The row that predicts token t is that of token t - 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from common.config import UserError
from models.decoder import attend_with

RECORDED = "recorded"  # our name for it in transformers' registry


@dataclass(frozen=True)
class AttentionRecord:
    """What one caption's T tokens, the closing EOS last, attended to: P patches, L layers. All float32."""

    ids: list[int]
    """(T) token ids."""
    probabilities: np.ndarray
    """(T) probability of each token."""
    mean: np.ndarray
    """(L, T, P) attention, mean over heads."""
    peak: np.ndarray
    """(2, T, P) attention of the last layer but one and of the last, maximum over heads."""
    lens: np.ndarray
    """(T, P) each token's logit, read off the final state at each patch (the logit lens)."""


@dataclass
class Recorder:
    """Keeps attention while a model runs one pass."""

    rows: Tensor
    """(B, T) queries whose attention is wanted."""
    columns: Tensor
    """(B, P) keys of the image patches."""
    mean: list[Tensor] = field(default_factory=list)
    """(B, T, P) for each layer."""
    peak: list[Tensor] = field(default_factory=list)
    """(B, T, P) of the last two layers."""

    def record(self, query: Tensor, key: Tensor, mask: Tensor, scaling: float | None) -> None:
        """(B, H, Q, D) queries, (B, G, K, D) keys of G groups of heads, mask (B, 1, Q, K) to add."""
        batch, heads, _, width = query.shape
        rows = self.rows[:, None, :, None]  # (B, 1, T, 1)
        query = query.gather(2, rows.expand(-1, heads, -1, width))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        scores = query.float() @ key.float().transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        mask = mask[..., : key.shape[2]].expand(batch, -1, -1, -1)
        scores = scores + mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        seen = scores.softmax(dim=-1).gather(3, self.columns[:, None, None, :].expand(-1, heads, rows.shape[2], -1))
        self.mean.append(seen.mean(dim=1))
        self.peak = [*self.peak[-1:], seen.amax(dim=1)]


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def _recorded_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    recorder = _recorder.get()
    if recorder is not None:
        recorder.record(query, key, attention_mask, kwargs.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(RECORDED, _recorded_sdpa)
AttentionMaskInterface.register(RECORDED, eager_mask)  # without a mask function tokens would see the future


@contextmanager
def record_attention(lm: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[Recorder]:
    """Record the layers of a transformers language model while it runs one pass; then it attends by sdpa again.

    Raises UserError where no layer passed by: such a model does not use transformers' attention interface.
    """
    recorder = Recorder(rows, columns)
    token = _recorder.set(recorder)
    try:
        with attend_with(lm, RECORDED, after="sdpa"):
            yield recorder
    finally:
        _recorder.reset(token)
    if not recorder.mean:
        raise UserError(f"{type(lm).__name__} computes attention by itself: it cannot be recorded")


def unembedding_rows(head: nn.Module, ids: Tensor) -> Tensor:
    """(...) ids -> (..., D) rows of an output head, with peft's adapter on it."""
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    rows = base.weight[ids]
    for adapter in getattr(head, "active_adapters", ()) if base is not head else ():
        rows = rows + head.get_delta_weight(adapter)[ids]
    return rows


def read_records(
    recorder: Recorder, states: Tensor, patches: Tensor, head: nn.Module, captions: Sequence[Sequence[list[int]]]
) -> list[list[AttentionRecord]]:
    """The records of each row's captions, which lie one behind the other in the row, each with its closing EOS.

    `states` (B, T, D) are the final states of the recorded queries, `patches` (B, P, D) those of the image patches.
    """
    flat = [[token for caption in row for token in caption] for row in captions]
    ids = torch.tensor([row + [0] * (states.shape[1] - len(row)) for row in flat], device=states.device)
    chances = head(states).float().softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    lens = unembedding_rows(head, ids).float() @ patches.float().transpose(1, 2)  # (B, T, P)
    mean, peak = torch.stack(recorder.mean), torch.stack(recorder.peak)  # (L, B, T, P), (2, B, T, P)
    chances, lens, mean, peak = (tensor.cpu().numpy() for tensor in (chances, lens, mean, peak))
    records = []
    for b, row in enumerate(captions):
        start, found = 0, []
        for caption in row:
            at = slice(start, start + len(caption))
            found.append(AttentionRecord(caption, chances[b, at], mean[:, b, at], peak[:, b, at], lens[b, at]))
            start = at.stop
        records.append(found)
    return records


def randomize(module: nn.Module) -> None:
    """Draw every matrix, kernel and class token anew; norms and biases stay, or all inputs would give one output."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or "class_embedding" in name:
            width = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            nn.init.normal_(parameter, std=width**-0.5)
