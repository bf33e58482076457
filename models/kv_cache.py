"""Keys and values for decoding behind long image prefixes, where handling them costs more than the words do.

transformers' DynamicCache copies all that it holds for each new token, into fresh memory each time; its StaticLayer
writes a token in its place. It wants to know how many will come, which a captioner knows.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from models.decoder import attending


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
