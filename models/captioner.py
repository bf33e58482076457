"""The captioner: frozen encoder, projector, decoder. Its loss over packed captions, and its generation.

The decoder reads `image embeddings + EOS + caption` and learns `caption + EOS`. Captions of one photo share its
prefix in one row, each with its own positions and a mask that hides its neighbours, so that the gradients equal
those of one row a pair (the same packing as in sequence packing for language models, arXiv 2107.02027).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from common.config import UserError
from models.decoder import DecoderConfig, LoraConfig, add_lora, causal_lm, fuse_gelu, load_decoder, merge_lora
from models.decoding import Decoding, generation_config, one_query_attention, samplers, until_eos, with_room
from models.encoder import EncoderConfig, FrozenEncoder, build_encoder
from models.packing import ChunkedCrossEntropy, PackedBatch, packed_hidden
from models.projector import Projector, ProjectorConfig


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

    def forward(self, features: Tensor, rows: PackedBatch) -> tuple[Tensor, int]:
        """(B, P, D_image) features and B packed rows -> weighted sum of the supervised losses, their number."""
        image = self.prefix(features)
        hidden = self.hidden(image, rows)[:, image.shape[1] :].flatten(0, 1)
        head = causal_lm(self.decoder).get_output_embeddings()
        weights = [weight for weight in head.parameters() if weight.requires_grad and torch.is_grad_enabled()]
        states, labels = hidden[rows.supervised], rows.labels.flatten()[rows.supervised]
        return ChunkedCrossEntropy.apply(states, labels, rows.weights, head, *weights), len(labels)

    def hidden(self, image: Tensor, rows: PackedBatch) -> Tensor:
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
