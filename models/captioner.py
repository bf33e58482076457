"""The captioner: frozen encoder, projector, decoder. Its loss over packed captions, and its generation.

The decoder reads `image embeddings + EOS + caption` and learns `caption + EOS`. Captions of one photo share its
prefix in one row, each with its own positions and a mask that hides its neighbours, so that the gradients equal
those of one row a pair (the same packing as in sequence packing for language models, arXiv 2107.02027).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common import UserError
from models.decoder import DecoderConfig, LoraConfig, add_lora, causal_lm, fuse_gelu, load_decoder, merge_lora
from models.encoder import EncoderConfig, FrozenEncoder, build_encoder
from models.projector import Projector, ProjectorConfig

IMAGE, PADDING = 0, -1  # segments; captions are 1, 2, ...


@dataclass(frozen=True)
class CaptionerConfig:
    """All that is needed to build a captioner, but for what training has learnt."""

    encoder: EncoderConfig = EncoderConfig()
    """The frozen image encoder."""
    projector: ProjectorConfig = ProjectorConfig()
    """What maps patch features to word embeddings."""
    decoder: DecoderConfig = DecoderConfig()
    """The language model."""
    lora: LoraConfig = LoraConfig()
    """The decoder's adapters."""


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


@dataclass
class Rows:
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
    weights: Tensor
    """(N,) what each of these labels counts in the loss."""

    def pin_memory(self) -> "Rows":
        return Rows(*(getattr(self, field.name).pin_memory() for field in fields(self)))

    def to(self, device: torch.device) -> "Rows":
        at_once = self.labels.is_pinned()
        return Rows(*(getattr(self, field.name).to(device, non_blocking=at_once) for field in fields(self)))


def pack_rows(
    rows: Sequence[Sequence[Sequence[int]]],
    eos: int,
    first: int | None = None,
    weights: Sequence[Sequence[float]] | None = None,
) -> Rows:
    """Pack each photo's tokenised captions into one row; every caption begins behind `first`, EOS without it.

    `weights` holds one for each caption; without them all count 1.

    >>> rows = pack_rows([[[5, 6, 7], [8]]], eos=0)
    >>> rows.input_ids.tolist(), rows.labels.tolist()
    ([[0, 5, 6, 7, 0, 8]], [[5, 6, 7, 0, 8, 0]])
    >>> rows.positions.tolist(), rows.segments.tolist()
    ([[0, 1, 2, 3, 0, 1]], [[1, 1, 1, 1, 2, 2]])
    """
    first = eos if first is None else first
    length = max(sum(len(caption) + 1 for caption in row) for row in rows)
    input_ids = torch.full((len(rows), length), eos)
    labels = torch.full((len(rows), length), -100)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.full((len(rows), length), PADDING)
    counts = torch.ones(len(rows), length)
    for b, row in enumerate(rows):
        start = 0
        for number, caption in enumerate(row, start=1):
            place = slice(start, start + len(caption) + 1)
            input_ids[b, place] = torch.tensor([first, *caption])
            labels[b, place] = torch.tensor([*caption, eos])
            positions[b, place] = torch.arange(len(caption) + 1)
            segments[b, place] = number
            if weights:
                counts[b, place] = weights[b][number - 1]
            start = place.stop
    supervised = (labels.flatten() != -100).nonzero()[:, 0]  # found here, since a GPU would have to be waited for
    return Rows(input_ids, labels, positions, segments, supervised, counts.flatten()[supervised])


def prefix_mask(segments: Tensor, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """(B, L) segments -> (B, 1, P + L, P + L) additive mask: causal; a caption sees the image and itself."""
    full = F.pad(segments, (image_tokens, 0), value=IMAGE)
    length = full.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=full.device).tril()
    seen = causal & ((full[:, None, :] == IMAGE) | (full[:, None, :] == full[:, :, None]))
    return torch.zeros(seen.shape, dtype=dtype, device=full.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def packed_hidden(model: nn.Module, prefix: Tensor, rows: Rows) -> Tensor:
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
    """Weighted sum of cross-entropies of `head(hidden)`, in chunks, the gradient formed in the same pass.

    The full logits (N, vocabulary) in float32 never exist: at GPT-2's vocabulary they would outweigh the model.
    """

    CHUNKS = {"cpu": 256, "cuda": 4096}  # what fits into a CPU's caches; a GPU idles between small ones

    @staticmethod
    def forward(ctx, hidden: Tensor, labels: Tensor, counts: Tensor, head: nn.Module, *weights: Tensor) -> Tensor:
        """(N, D) hidden states, (N,) labels and what each counts; `weights` are the head's that train. -> () float32"""
        total = torch.zeros((), device=hidden.device)
        needed = any(ctx.needs_input_grad)
        hidden_grads, weight_grads = [], [torch.zeros_like(weight) for weight in weights]
        size = ChunkedCrossEntropy.CHUNKS.get(hidden.device.type, 256)
        for states, targets, count in zip(*(x.split(size) for x in (hidden, labels, counts))):
            with torch.set_grad_enabled(needed):
                states = states.detach().requires_grad_(needed)
                loss = F.cross_entropy(head(states).float(), targets, reduction="none") @ count
            if needed:
                states_grad, *grads = torch.autograd.grad(loss, [states, *weights])
                hidden_grads.append(states_grad)
                for sum_, grad in zip(weight_grads, grads):
                    sum_ += grad
            total += loss.detach()
        if needed:
            ctx.save_for_backward(torch.cat(hidden_grads), *weight_grads)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden_grad, *weight_grads = ctx.saved_tensors
        return hidden_grad * grad, None, None, None, *(weight_grad * grad for weight_grad in weight_grads)


class Captioner(nn.Module):
    """Build it with `build_captioner`, or `models.checkpoint.load_captioner` for a trained one."""

    def __init__(
        self, encoder: FrozenEncoder, projector: Projector, decoder: nn.Module, tokenizer, config: CaptionerConfig
    ):
        super().__init__()
        self.encoder, self.projector, self.decoder = encoder, projector, decoder
        self.tokenizer, self.config = tokenizer, config

    def train(self, mode: bool = True) -> "Captioner":
        """The decoder's own dropout (GPT-2 has three kinds) stays off: what is frozen needs no regularising."""
        super().train(mode)
        self.decoder.eval()
        for module in self.decoder.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(mode)
        return self

    def check_room(self, text_tokens: int, key: str) -> None:
        """Raise a UserError, naming the setting `key`, where the decoder has no positions for so long a text."""
        room = getattr(causal_lm(self.decoder).config, "max_position_embeddings", None)
        if room is not None and self.encoder.tokens + 1 + text_tokens > room:
            raise UserError(
                f"{key}: {self.encoder.tokens} image tokens, EOS and {text_tokens} text tokens do not fit into the "
                f"decoder's {room} positions"
            )

    def prefix(self, features: Tensor) -> Tensor:
        """(B, P, D_image) -> (B, P, D_text), in the decoder's dtype."""
        return self.projector(features).to(causal_lm(self.decoder).dtype)

    def forward(self, features: Tensor, rows: Rows) -> tuple[Tensor, int]:
        """(B, P, D_image) features and B packed rows -> weighted sum of the supervised losses, their number."""
        image = self.prefix(features)
        hidden = self.hidden(image, rows)[:, image.shape[1] :].flatten(0, 1)
        head = causal_lm(self.decoder).get_output_embeddings()
        weights = [weight for weight in head.parameters() if weight.requires_grad and torch.is_grad_enabled()]
        states, labels = hidden[rows.supervised], rows.labels.flatten()[rows.supervised]
        return ChunkedCrossEntropy.apply(states, labels, rows.weights, head, *weights), len(labels)

    def hidden(self, image: Tensor, rows: Rows) -> Tensor:
        """(B, P, D_text) image prefix and B packed rows of L tokens -> (B, P + L, D_text) final hidden states."""
        return packed_hidden(causal_lm(self.decoder).base_model, image, rows)

    def merge(self) -> "Captioner":
        """Fold LoRA into the decoder, for inference."""
        self.decoder = merge_lora(self.decoder)
        fuse_gelu(self.decoder)
        return self

    def place(self, device: torch.device, dtype: torch.dtype) -> "Captioner":
        """Move all to `device`, the decoder to `dtype`; encoder and projector stay in float32."""
        self.encoder.to(device)
        self.projector.to(device)
        self.decoder.to(device, dtype)
        return self

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """B RGB photos -> (B, P, D_image)."""
        pixels = torch.stack([self.encoder.transform(image) for image in images])
        return self.encoder(pixels.to(self.encoder.device))

    @torch.inference_mode()
    def generate(self, features: Tensor, decoding: Decoding = Decoding(), seeds: Sequence[int] = ()) -> list[list[int]]:
        """(B, P, D_image) -> token ids of B captions, without EOS; sampling draws by one of B `seeds` for each.

        All photos have equally long prefixes, so that nothing is padded; each is read once, whatever the beams.
        """
        from models.kv_cache import one_query_attention, with_room
        from models.sampling import generation_config, samplers, until_eos

        lm, eos = causal_lm(self.decoder), self.tokenizer.eos_token_id
        image = self.prefix(features)
        # on a CPU a few photos at a time, so that what passes between layers stays in its caches
        parts = image.split(8) if image.device.type == "cpu" else [image]
        caches = [lm.base_model(inputs_embeds=part, use_cache=True).cache for part in parts]
        # the image's places count; what id stands there does not, for its keys and values are in the cache
        ids = torch.full((len(image), image.shape[1] + 1), eos, device=image.device)
        with one_query_attention(lm):
            out = lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                cache=with_room(caches, decoding.num_beams, decoding.max_new_tokens),
                generation_config=generation_config(decoding, eos, pad=eos),
                logits_processor=samplers(decoding, seeds),
            )
        return until_eos(out[:, ids.shape[1] :], eos)

    def caption(self, features: Tensor, decoding: Decoding = Decoding(), seeds: Sequence[int] = ()) -> list[str]:
        """The captions of `generate` as text."""
        return [self.text(ids) for ids in self.generate(features, decoding, seeds)]

    def text(self, ids: Sequence[int]) -> str:
        """Token ids -> caption, white space collapsed."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())


def build_captioner(config: CaptionerConfig, load_weights: bool = True) -> Captioner:
    """A fresh captioner: random projector, LoRA that changes nothing yet. Without `load_weights` on the meta device."""
    encoder = build_encoder(config.encoder, load_weights)
    lm, tokenizer = load_decoder(config.decoder, load_weights)
    width_text = lm.get_input_embeddings().embedding_dim
    with torch.device("cpu" if load_weights else "meta"):
        projector = Projector(config.projector, encoder.width, width_text)
    return Captioner(encoder, projector, add_lora(lm, config.lora), tokenizer, config)
