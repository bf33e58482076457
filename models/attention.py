"""Attention records: which image patches each token of a caption attended to, from one pass over the caption.

Captions are generated in sdpa attention with a cache. Then photo, prompt and caption are read once more, without one,
by an attention function that calls sdpa too, and also computes the softmax of the caption's rows and keeps the image's
columns of it, averaged over heads. `output_attentions=True` would keep every row and column of every head, in eager
attention, which changes captions. The row that predicts token t is that of token t - 1.

What costs more than that is made when it is asked for, by the names of EXTRAS.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import ModelOutput

from common.config import UserError
from models.decoder import attend_with
from models.decoding import CACHE

RECORDED = "recorded"  # our name for it in transformers' registry
EXTRAS = ("heads", "rollout", "gradcam", "relevancy")


@dataclass(frozen=True)
class AttentionRecord:
    """What one caption's T tokens, the closing EOS last, attended to: P patches, L layers, H heads. All float32."""

    ids: list[int]
    """(T) token ids."""
    probabilities: np.ndarray
    """(T) probability of each token."""
    mean: np.ndarray
    """(L, T, P) attention, mean over heads."""
    peak: np.ndarray
    """(2, T, P) attention of the last layer but one and of the last, maximum over heads."""
    shares: np.ndarray
    """(L, T, 3) attention, mean over heads, to all patches, to the caption so far (with the token that opens it), and
    to the first token of all, where that is no patch. The rest went to the prompt."""
    lens: np.ndarray
    """(T, P) each token's logit, read off the final state at each patch (the logit lens)."""
    text: np.ndarray
    """(T, T) the same, read off the final state that predicts each token of the caption."""
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """Those of EXTRAS that were asked for: heads (L, H, T, P) is each head's attention, the others are (T, P) maps."""


@dataclass
class Recorder:
    """Keeps attention while a language model runs one pass."""

    lm: nn.Module
    """The language model."""
    rows: Tensor
    """(B, T) queries whose attention is wanted."""
    columns: Tensor
    """(B, P) keys of the image patches; where a photo has fewer, its first one again."""
    extra: Collection[str] = ()
    """Names of EXTRAS that are wanted beside it."""
    mean: list[Tensor] = field(default_factory=list)
    """(B, T, P) for each layer."""
    peak: list[Tensor] = field(default_factory=list)
    """(B, T, P) of the last two layers."""
    shares: list[Tensor] = field(default_factory=list)
    """(B, T, 3) for each layer."""
    call: dict = field(default_factory=dict)
    """What the language model was called with."""
    out: ModelOutput | None = None
    """What it returned."""

    def keep(self, module: nn.Module, args: tuple, call: dict, out: ModelOutput) -> None:
        """A forward hook of the language model."""
        self.call, self.out = call, out

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs):
        """An attention function of transformers: sdpa that is also recorded.

        (B, H, Q, D) queries, (B, G, K, D) keys and values of G groups of heads, mask (B, 1, Q, K) to add to the scores.
        """
        out, scaling = sdpa_attention_forward(module, query, key, value, mask, **kwargs), kwargs.get("scaling")
        batch, heads, _, width = query.shape
        rows = self.rows[:, None, :, None]  # (B, 1, T, 1)
        query = query.gather(2, rows.expand(-1, heads, -1, width))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        scores = query.float() @ key.float().transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        scores += mask.expand(batch, -1, -1, -1).gather(2, rows.expand(-1, 1, -1, mask.shape[3]))
        seen = scores.softmax(dim=-1)
        photo = seen.gather(3, self.columns[:, None, None, :].expand(-1, heads, rows.shape[2], -1))
        self.mean.append(photo.mean(dim=1))
        self.peak = [*self.peak[-1:], photo.amax(dim=1)]
        seen, place = seen.mean(dim=1), torch.arange(key.shape[2], device=rows.device)
        first = (seen[:, 0] > 0).int().argmax(dim=1)[:, None, None]  # padding on the left is not seen
        patch = (place == self.columns[..., None]).any(dim=1, keepdim=True)  # (B, 1, K)
        caption = place >= rows[:, 0, :1]
        kinds = torch.cat([patch, caption, (place == first) & ~patch], dim=1)  # (B, 3, K)
        self.shares.append(seen @ kinds.to(seen.dtype).transpose(1, 2))
        return out


AttentionMaskInterface.register(RECORDED, eager_mask)  # to add to the scores; without one tokens would see the future


@contextmanager
def record_attention(lm: nn.Module, rows: Tensor, columns: Tensor, extra: Collection[str] = ()) -> Iterator[Recorder]:
    """Record the layers of a transformers language model while it runs one pass; then it attends by sdpa again.

    Raises UserError where no layer passed by: such a model does not use transformers' attention interface.
    """
    recorder = Recorder(lm, rows, columns, extra)
    AttentionInterface.register(RECORDED, recorder.attend)
    with lm.register_forward_hook(recorder.keep, with_kwargs=True), attend_with(lm, RECORDED, after="sdpa"):
        yield recorder
    AttentionInterface.register(RECORDED, sdpa_attention_forward)  # forgets the recorder and what it holds
    if not recorder.mean:
        raise UserError(f"{type(lm).__name__} computes attention by itself: it cannot be recorded")


def explain(recorder: Recorder, ids: Tensor, head: nn.Module) -> dict[str, Tensor]:
    """Those of EXTRAS that are wanted, for the tokens `ids` (B, T): heads (B, L, H, T, P), the others (B, T, P).

    The recorded pass, one over the whole text, runs again in eager attention, which gives out all attention and lets
    gradients through it. For gradcam and relevancy it then goes back once for each token.

    - rollout (Abnar and Zuidema 2020): the product of all layers' attention plus identity. The paper halves each
      factor, which scales all maps alike.
    - relevancy (Chefer et al. 2021): the product of the positive part of attention times gradient, plus identity.
    - gradcam (Selvaraju et al. 2017): the features of the image tokens that go into the last layer (behind it no word
      depends on them), each weighted by the mean of the logit's gradient over the patches.
    """
    backward = [name for name in ("gradcam", "relevancy") if name in recorder.extra]
    embeddings = recorder.call["inputs_embeds"].detach().requires_grad_(bool(backward))
    call = {name: value for name, value in recorder.call.items() if name != CACHE}  # the recorded pass has filled it
    call |= {"inputs_embeds": embeddings, "use_cache": False, "output_attentions": True, "output_hidden_states": True}
    batch, rows, columns = torch.arange(len(ids), device=ids.device)[:, None], recorder.rows, recorder.columns
    with torch.set_grad_enabled(bool(backward)), attend_with(recorder.lm, "eager", after="sdpa"):
        out = recorder.lm(**call)
        states = out.last_hidden_state[batch, rows].float()
        logits = (states * head.weight[ids].float()).sum(dim=(0, 2)).unbind()  # T, each of all rows
    layers, features, found = out.attentions, out.hidden_states[-2], {name: [] for name in backward}
    patch = torch.zeros(embeddings.shape[:2], device=ids.device).scatter(1, columns, 1.0)  # (B, Q), each patch once
    for t, logit in enumerate(logits if backward else ()):
        inputs = (features, *layers) if "relevancy" in backward else (features,)  # for gradcam it goes back one layer
        gradient, *gradients = torch.autograd.grad(logit, inputs, retain_graph=True)
        if "gradcam" in found:
            weights = patch[:, None] @ gradient.float() / patch.sum(dim=1)[:, None, None]  # (B, 1, D)
            found["gradcam"].append((features[batch, columns].float() * weights).sum(dim=2))
        if "relevancy" in found:
            used = [(a * g).clamp(min=0).float().mean(dim=1) for a, g in zip(layers, gradients)]
            found["relevancy"].append(_flow(rows[:, t : t + 1], used, columns)[:, 0])
    found = {name: torch.stack(maps, dim=1) for name, maps in found.items()}
    if "rollout" in recorder.extra:
        found["rollout"] = _flow(rows, [layer.float().mean(dim=1) for layer in layers], columns)
    if "heads" in recorder.extra:
        at = batch[..., None], rows[..., None], columns[:, None]  # (B, T, P)
        found["heads"] = torch.stack([layer.movedim(1, 3)[at].movedim(3, 1).float() for layer in layers], dim=1)
    return found


def _flow(rows: Tensor, layers: Sequence[Tensor], columns: Tensor) -> Tensor:
    """What comes to `rows` (B, T) from `columns` (B, P) through all layers (B, Q, Q) and around each: (B, T, P)."""
    flow = F.one_hot(rows, layers[0].shape[-1]).float()
    for layer in layers[::-1]:
        flow = flow + flow @ layer
    return flow.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))


def read_records(
    recorder: Recorder, head: nn.Module, captions: Sequence[Sequence[Sequence[int]]], eos: int
) -> list[list[AttentionRecord]]:
    """The records of each row's captions, which lie one behind the other in the row, each closed by `eos`.

    The output head is a plain layer, with adapters folded in.
    """
    captions = [[[*caption, eos] for caption in row] for row in captions]
    flat, hidden = [sum(row, []) for row in captions], recorder.out.last_hidden_state
    batch = torch.arange(len(flat), device=hidden.device)[:, None]
    states, patches = hidden[batch, recorder.rows], hidden[batch, recorder.columns]  # (B, T, D), (B, P, D)
    ids = torch.tensor([row + [0] * (states.shape[1] - len(row)) for row in flat], device=states.device)
    chances = head(states).float().softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    words = head.weight[ids].float()
    lens, text = (words @ those.float().transpose(1, 2) for those in (patches, states))  # (B, T, P), (B, T, T)
    kept = {name: torch.stack(getattr(recorder, name), dim=1) for name in ("mean", "peak", "shares")} | {"lens": lens}
    kept |= explain(recorder, ids, head) if recorder.extra else {}
    chances, text, *parts = (tensor.cpu().numpy() for tensor in (chances, text, *kept.values()))  # parts (B, ..., T, ?)
    records = []
    for b, row in enumerate(captions):
        start, found = 0, []
        for caption in row:
            at = slice(start, start + len(caption))
            own = {name: part[b][..., at, :] for name, part in zip(kept, parts)}
            extra = {name: own.pop(name) for name in recorder.extra}
            found.append(AttentionRecord(caption, chances[b, at], text=text[b, at, at], extra=extra, **own))
            start = at.stop
        records.append(found)
    return records


def randomize(module: nn.Module) -> None:
    """Draw every matrix, kernel and class token anew; norms and biases stay, or all inputs would give one output."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or "class_embedding" in name:
            width = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            nn.init.normal_(parameter, std=width**-0.5)
