"""The probe: which image patches each token of a caption attended to, from one teacher-forced pass.

Captions are generated in sdpa attention with its cache; then the whole caption is read once more by an attention
function that calls sdpa too, and beside it computes the softmax of the caption's rows, of which it keeps the image's
columns, averaged over heads. `output_attentions=True` keeps every row and column of every head instead, in eager
attention, which changes captions. The row that predicts token t is that of token t - 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from common.config import UserError
from models.captioner import Captioner
from models.decoder import causal_lm
from models.decoding import Decoding
from models.encoder import PatchGrid, PhotoTransform
from models.packing import pack_rows
from models.vlm import Llava

NAME = "probe"


@dataclass(frozen=True)
class Look:
    """What one caption's T tokens, the closing EOS last, looked at: P patches, L layers. All float32."""

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
    """What is kept of each layer."""

    rows: Tensor
    """(B, T) positions whose attention is wanted."""
    columns: Tensor
    """(B, P) positions of the image patches."""
    mean: list[Tensor] = field(default_factory=list)
    """(B, T, P) a layer."""
    peak: list[Tensor] = field(default_factory=list)
    """(B, T, P) of the last two layers."""

    def record(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """(B, H, Q, D) queries, (B, G, K, D) keys of G groups of heads, mask (B, 1, Q, K) or None for plain causal."""
        batch, heads, length, width = query.shape
        rows = self.rows[:, None, :, None]  # (B, 1, T, 1)
        query = query.gather(2, rows.expand(-1, heads, -1, width))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        scores = query.float() @ key.float().transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        if mask is not None:
            mask = mask[..., : key.shape[2]].expand(batch, -1, -1, -1)
            own = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
            scores = scores.masked_fill(~own, float("-inf")) if own.dtype == torch.bool else scores + own
        elif length > 1:
            scores = scores.masked_fill(torch.arange(length, device=rows.device) > rows, float("-inf"))
        seen = scores.softmax(dim=-1).gather(3, self.columns[:, None, None, :].expand(-1, heads, rows.shape[2], -1))
        self.mean.append(seen.mean(dim=1))
        self.peak = [*self.peak[-1:], seen.amax(dim=1)]


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    recorder = _recorder.get()
    if recorder is not None:
        recorder.record(query, key, attention_mask, kwargs.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function of its own, the future would be seen


@contextmanager
def probing(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[Recorder]:
    """Record the text layers of a transformers model while it runs one pass; its own attention comes back after it.

    Raises RuntimeError where nothing came by: the model's attention does not go through transformers' interface.
    """
    config, parts = model.config, [name for name in ("text_config", "vision_config") if hasattr(model.config, name)]
    before = {name: getattr(config, name)._attn_implementation for name in parts} or config._attn_implementation
    recorder = Recorder(rows, columns)
    model.set_attn_implementation(before | {"text_config": NAME} if parts else NAME)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)
        model.set_attn_implementation(before)
    if not recorder.mean:
        raise RuntimeError(f"{type(model).__name__} computes its attention by itself: it cannot be probed")


def unembedding_rows(head: nn.Module, ids: Tensor) -> Tensor:
    """(...) ids -> (..., D) rows of an output head, peft's adapter on it included."""
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    rows = base.weight[ids]
    for adapter in getattr(head, "active_adapters", ()) if base is not head else ():
        rows = rows + head.get_delta_weight(adapter)[ids]
    return rows


def _looks(recorder: Recorder, hidden: Tensor, head: nn.Module, captions: Sequence[Sequence[int]]) -> list[Look]:
    """Looks of B captions (each with its closing EOS) from the final hidden states (B, N, D)."""
    longest = recorder.rows.shape[1]
    ids = torch.tensor([[*caption, *[caption[-1]] * (longest - len(caption))] for caption in captions])
    ids = ids.to(hidden.device)
    width = hidden.shape[-1]
    states = hidden.gather(1, recorder.rows[..., None].expand(-1, -1, width))  # (B, T, D)
    patches = hidden.gather(1, recorder.columns[..., None].expand(-1, -1, width))  # (B, P, D)
    chances = head(states).float().softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    lens = unembedding_rows(head, ids).float() @ patches.float().transpose(1, 2)  # (B, T, P)
    mean, peak = torch.stack(recorder.mean), torch.stack(recorder.peak)  # (L, B, T, P), (2, B, T, P)
    return [
        Look(
            list(caption),
            chances[b, : len(caption)].cpu().numpy(),
            mean[:, b, : len(caption)].cpu().numpy(),
            peak[:, b, : len(caption)].cpu().numpy(),
            lens[b, : len(caption)].cpu().numpy(),
        )
        for b, caption in enumerate(captions)
    ]


def _rows(first: int, captions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T) positions that predict each caption's tokens, the first by position `first`; the last one fills up."""
    longest = max(map(len, captions))
    return torch.tensor([[first + min(t, len(own) - 1) for t in range(longest)] for own in captions], device=device)


@torch.inference_mode()
def look_captioner(captioner: Captioner, features: Tensor, captions: Sequence[Sequence[int]]) -> list[Look]:
    """What our captioner looked at: (B, P, D_image) features, B captions as token ids without EOS."""
    lm, eos = causal_lm(captioner.decoder), captioner.tokenizer.eos_token_id
    image = captioner.prefix(features)
    tokens, device = image.shape[1], image.device
    patches = captioner.encoder.patch_rows_columns[0] * captioner.encoder.patch_rows_columns[1]
    columns = torch.arange(tokens - patches, tokens, device=device).expand(len(image), -1)  # no class token
    closed = [[*caption, eos] for caption in captions]
    with probing(lm, _rows(tokens, closed, device), columns) as recorder:
        hidden = captioner.hidden(image, pack_rows([[list(caption)] for caption in captions], eos).to(device))
    return _looks(recorder, hidden, lm.get_output_embeddings(), closed)


@torch.inference_mode()
def look_llava(llava: Llava, images: Sequence[Image.Image], captions: Sequence[Sequence[int]]) -> list[Look]:
    """What a LLaVA looked at: B photos, B captions as token ids without EOS."""
    model, inputs = llava.model, dict(llava.inputs(images))
    ids, mask, device = inputs.pop("input_ids"), inputs.pop("attention_mask"), model.device
    # a model may write the image's token, but the photo stands once in its prompt
    captions = [[token for token in caption if token != model.config.image_token_id] for caption in captions]
    closed = [[*caption, llava.processor.tokenizer.eos_token_id] for caption in captions]
    pad, longest = llava.processor.tokenizer.pad_token_id, max(map(len, captions))
    own = torch.tensor([[*caption, *[pad] * (longest - len(caption))] for caption in captions], device=device)
    real = torch.tensor([[1] * len(caption) + [0] * (longest - len(caption)) for caption in captions], device=device)
    rows = _rows(ids.shape[1] - 1, closed, device)
    image = ids == model.config.image_token_id
    columns = image.nonzero()[:, 1].view(len(ids), -1)
    ids, mask = torch.cat([ids, own.long()], dim=1), torch.cat([mask, real.to(mask.dtype)], dim=1)
    for name, value in inputs.items():  # token types, which go on as they were
        if value.shape == image.shape:
            inputs[name] = torch.cat([value, value[:, -1:].expand(-1, longest)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # left padding takes no place
    with probing(model, rows, columns) as recorder:
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **inputs
        ).last_hidden_state
    return _looks(recorder, hidden, model.get_output_embeddings(), closed)


# ------------------------------------------------------------------------------------------- one form for both


def randomize(module: nn.Module) -> None:
    """Draw every matrix, kernel and class token anew; norms and biases stay, without which nothing is told apart."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or "class_embedding" in name:
            width = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            nn.init.normal_(parameter, std=width**-0.5)


class CaptionerEye:
    """Our captioner as P3 uses a model. Its LoRA should be merged.

    `see` gives the features of photos and their decoded images; without it the images are encoded.
    """

    def __init__(self, captioner: Captioner, see: Callable[[Sequence, Sequence[Image.Image]], Tensor] | None = None):
        self.see = see or self._encode
        self.captioner, self.tokenizer, self.text = captioner.eval(), captioner.tokenizer, captioner.text

    def _encode(self, photos: Sequence, images: Sequence[Image.Image]) -> Tensor:
        return self.captioner.features(images)

    def grid(self, width: int, height: int) -> PatchGrid:
        """Where the patches lie on a photo of so many pixels."""
        return self.captioner.encoder.grid(width, height)

    def check_room(self, tokens: int) -> None:
        """Raise a UserError where captions of so many tokens do not fit."""
        self.captioner.check_room(tokens, "annotations")

    def generate(
        self, photos: Sequence, images: Sequence[Image.Image], decoding: Decoding, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Captions as token ids without EOS."""
        return self.captioner.generate(self.see(photos, images), decoding, seeds)

    def ids(self, text: str) -> list[int]:
        """A caption's token ids, as in training."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def look(self, photos: Sequence, images: Sequence[Image.Image], captions: Sequence[Sequence[int]]) -> list[Look]:
        return look_captioner(self.captioner, self.see(photos, images), captions)

    def randomize(self) -> None:
        """Let all weights be random."""
        randomize(self.captioner)
        self.see = self._encode  # what the cache holds is of the weights that were


class LlavaEye:
    """A LLaVA as P3 uses a model. Raises UserError where its patches lie on no fixed grid."""

    def check_room(self, tokens: int) -> None:
        """Llama's positions have no end that a caption would reach."""

    def __init__(self, llava: Llava):
        self.llava, self.tokenizer, self.text = llava, llava.processor.tokenizer, llava.text
        config, look = llava.model.config, llava.processor.image_processor
        size, crop = getattr(look, "size", None) or {}, getattr(look, "crop_size", None) or {}
        crops = getattr(look, "do_center_crop", False) and "shortest_edge" in size and "height" in crop
        if config.model_type != "llava" or not crops or config.vision_feature_select_strategy != "default":
            raise UserError(
                f"model: expected a LLaVA that crops photos to one square, so that its patches can be placed; this is "
                f"{config.model_type}"
            )
        self.side = crop["height"] // config.vision_config.patch_size
        self.transform = PhotoTransform(crop["height"], size["shortest_edge"], (), (), "")

    def grid(self, width: int, height: int) -> PatchGrid:
        """Where the patches lie on a photo of so many pixels."""
        return PatchGrid(self.side, self.side, self.transform.seen_box(width, height))

    def generate(
        self, photos: Sequence, images: Sequence[Image.Image], decoding: Decoding, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Captions as token ids without EOS."""
        return self.llava.generate(images, {"": decoding}, {"": seeds})[""]

    def ids(self, text: str) -> list[int]:
        """A caption's token ids; what is written like a special token stays text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def look(self, photos: Sequence, images: Sequence[Image.Image], captions: Sequence[Sequence[int]]) -> list[Look]:
        return look_llava(self.llava, images, captions)

    def randomize(self) -> None:
        """Let all weights be random."""
        randomize(self.llava.model)


Eye = CaptionerEye | LlavaEye
