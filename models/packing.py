"""Captions of one photo behind one image prefix: packed rows, their mask, and the loss in chunks.

Captions of one photo share its prefix in one row, each with its own positions and a mask that hides its neighbours, so
that the gradients equal those of one row a pair (the same packing as for language models, arXiv 2107.02027).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import Caption

IMAGE, PADDING = 0, -1  # segments; captions are 1, 2, ...


class PackedBatch(NamedTuple):
    """Packed captions, one photo a row; L is the longest row's number of text tokens, the image prefix not counted."""

    input_ids: Tensor
    """(B, L) EOS and caption, EOS and caption, ..., padding."""
    labels: Tensor
    """(B, L) the next token of each, -100 on padding."""
    positions: Tensor
    """(B, L) place behind the image prefix: 0 at each caption's first EOS."""
    segments: Tensor
    """(B, L) 1, 2, ... by caption, PADDING on padding."""
    supervised: Tensor
    """(N,) where in the flattened rows there is a label."""
    token_weights: Tensor
    """(N,) weight of each of these labels in the loss."""

    def pin_memory(self) -> "PackedBatch":
        return PackedBatch(*(tensor.pin_memory() for tensor in self))

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack_rows(
    rows: Sequence[Sequence[Caption]], eos: int, first: int | None = None, weights: list[list[float]] | None = None
) -> PackedBatch:
    """Pack each photo's tokenised captions into one row; the token `first` (EOS by default) stands before each caption.

    `weights` has one for each caption; without them each is 1.

    >>> rows = pack_rows([[[5, 6, 7], [8]]], eos=0)
    >>> rows.input_ids.tolist(), rows.labels.tolist()
    ([[0, 5, 6, 7, 0, 8]], [[5, 6, 7, 0, 8, 0]])
    >>> rows.positions.tolist(), rows.segments.tolist()
    ([[0, 1, 2, 3, 0, 1]], [[1, 1, 1, 1, 2, 2]])
    """
    first = eos if first is None else first

    def joined(values: Callable[[int, Caption], Sequence[int]], padding: int) -> Tensor:
        """(B, L) `values(number, caption)` of a row's captions, one behind the other."""
        flat = [[one for number, own in enumerate(row, start=1) for one in values(number, own)] for row in rows]
        return nn.utils.rnn.pad_sequence(list(map(torch.tensor, flat)), batch_first=True, padding_value=padding)

    labels = joined(lambda number, caption: [*caption, eos], -100)
    lengths = torch.tensor([len(caption) + 1 for row in rows for caption in row])
    each = torch.ones(len(lengths)) if weights is None else torch.tensor(sum(weights, []))
    return PackedBatch(
        input_ids=joined(lambda number, caption: [first, *caption], eos),
        labels=labels,
        positions=joined(lambda number, caption: range(len(caption) + 1), 0),
        segments=joined(lambda number, caption: [number] * (len(caption) + 1), PADDING),
        supervised=(labels.flatten() != -100).nonzero()[:, 0],  # found here, since a GPU would have to be waited for
        token_weights=each.repeat_interleave(lengths),
    )


def prefix_mask(segments: Tensor, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """(B, L) segments -> (B, 1, P + L, P + L) additive mask: causal; a caption sees the image and itself."""
    full = F.pad(segments, (image_tokens, 0), value=IMAGE)
    length = full.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=full.device).tril()
    seen = causal & ((full[:, None, :] == IMAGE) | (full[:, None, :] == full[:, :, None]))
    return torch.zeros(seen.shape, dtype=dtype, device=full.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def packed_hidden(model: nn.Module, prefix: Tensor, rows: PackedBatch) -> Tensor:
    """(B, P, D) prefix embeddings and B packed rows of L tokens -> (B, P + L, D) final hidden states.

    `model` is a transformers language model without its head.
    """
    length = prefix.shape[1]
    inputs = torch.cat([prefix, model.get_input_embeddings()(rows.input_ids)], dim=1)
    positions = torch.arange(length, device=prefix.device).expand(len(prefix), -1)
    return model(
        inputs_embeds=inputs,
        attention_mask=prefix_mask(rows.segments, length, inputs.dtype),
        position_ids=torch.cat([positions, length + rows.positions], dim=1),
        use_cache=False,
    ).last_hidden_state


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies of `head(hidden)`, in chunks; the gradient is formed in the same pass.

    The full logits (N, vocabulary) in float32 never exist: with GPT-2's vocabulary they would outweigh the model.
    """

    CHUNKS = {"cpu": 256, "cuda": 4096}  # a chunk fits into a CPU's caches; small ones leave a GPU idle

    @staticmethod
    def forward(ctx, hidden: Tensor, labels: Tensor, token_weights: Tensor, head: nn.Module, *parameters: Tensor):
        """(N, D) states, (N,) labels and (N,) weights -> () float32; `parameters` are those of the head that train."""
        total = torch.zeros((), device=hidden.device)
        needed = any(ctx.needs_input_grad)
        hidden_grads, parameter_grads = [], [torch.zeros_like(parameter) for parameter in parameters]
        size = ChunkedCrossEntropy.CHUNKS.get(hidden.device.type, 256)
        for states, targets, weights in zip(hidden.split(size), labels.split(size), token_weights.split(size)):
            with torch.set_grad_enabled(needed):
                states = states.detach().requires_grad_(needed)
                # a product by `@` would be rounded to bf16 by autocast
                loss = (F.cross_entropy(head(states).float(), targets, reduction="none") * weights).sum()
            if needed:
                states_grad, *grads = torch.autograd.grad(loss, [states, *parameters])
                hidden_grads.append(states_grad)
                for sum_, grad in zip(parameter_grads, grads):
                    sum_ += grad
            total += loss.detach()
        if needed:
            ctx.save_for_backward(torch.cat(hidden_grads), *parameter_grads)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden_grad, *parameter_grads = ctx.saved_tensors
        return hidden_grad * grad, None, None, None, *(one * grad for one in parameter_grads)
