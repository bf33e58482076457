"""The captioner: frozen encoder, projector, decoder. Its loss over packed captions, its captions, its attention.

The decoder reads `image embeddings + EOS + caption` and learns `caption + EOS`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import UserError
from data.photos import LoadedPhoto
from models.attention import AttentionRecord, randomize, read_records, record_attention
from models.decoder import DecoderConfig, LoraConfig, add_lora, causal_lm, load_decoder, merge_lora
from models.decoding import Decodings, Seeds, TokenIds, generate_all, prefill
from models.encoder import EncoderConfig, FrozenEncoder, PatchGrid, build_encoder
from models.features import CachedEncoder
from models.packing import ChunkedCrossEntropy, PackedBatch, pack_rows, packed_hidden
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
    """A `models.interface.CaptionModel`; `build_captioner` makes a fresh one, `load_captioner` reads a trained one."""

    def __init__(
        self, encoder: FrozenEncoder, projector: Projector, decoder: nn.Module, tokenizer, config: CaptionerConfig
    ):
        super().__init__()
        self.encoder, self.projector, self.decoder = encoder, projector, decoder
        self.tokenizer, self.config = tokenizer, config
        self.encode = CachedEncoder(encoder)

    def train(self, mode: bool = True) -> "Captioner":
        """The decoder's own dropout (GPT-2 has three kinds) stays off: what is frozen needs no regularising."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        for module in self.decoder.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(mode)
        return self

    # ----------------------------------------------------------------------------------- training

    def prefix(self, features: Tensor) -> Tensor:
        """(B, P, D_image) -> (B, P, D_text) in the decoder's dtype; with a start token (B, 1 + P, D_text)."""
        lm = causal_lm(self.decoder)
        image = self.projector(features).to(lm.dtype)
        if not self.config.decoder.start_token:
            return image
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id  # one of them began pretraining's texts
        start = torch.full((len(image), 1), eos if bos is None else bos, device=image.device)
        return torch.cat([lm.get_input_embeddings()(start), image], dim=1)

    def forward(self, features: Tensor, batch: PackedBatch) -> tuple[Tensor, int]:
        """(B, P, D_image) features and B packed rows -> weighted sum of the supervised losses, their number."""
        prefix = self.prefix(features)
        lm = causal_lm(self.decoder)
        hidden = packed_hidden(lm.base_model, prefix, batch)[:, prefix.shape[1] :].flatten(0, 1)
        head = lm.get_output_embeddings()
        trained = [weight for weight in head.parameters() if weight.requires_grad and torch.is_grad_enabled()]
        states, labels = hidden[batch.supervised], batch.labels.flatten()[batch.supervised]
        return ChunkedCrossEntropy.apply(states, labels, batch.token_weights, head, *trained), len(labels)

    # ----------------------------------------------------------------------------------- inference

    def ready(self, device: torch.device, dtype: torch.dtype, features: Path | None = None) -> "Captioner":
        """For inference: fold LoRA into the decoder, move all to `device`, and the decoder to `dtype`.

        Encoder and projector stay in float32. `features` is the folder of features that training left.
        """
        self.decoder = merge_lora(self.decoder).to(dtype)
        self.encode = CachedEncoder(self.encoder, features)  # before the encoder moves: hashing reads its weights
        return self.to(device).eval()

    def room(self) -> float:
        """How many tokens a caption may have, for which the decoder has positions behind the image and EOS."""
        positions = getattr(causal_lm(self.decoder).config, "max_position_embeddings", math.inf)
        return positions - self.config.decoder.start_token - self.encoder.tokens - 1

    def check_room(self, text_tokens: int, key: str) -> None:
        """Raise a UserError that names the setting `key` where the decoder has no positions for so long a text."""
        if text_tokens > self.room():
            raise UserError(f"{key}: {text_tokens} text tokens, the decoder has positions for {self.room()}")

    def generate(self, photos: Sequence[LoadedPhoto], decodings: Decodings, seeds: Seeds) -> dict[str, list[TokenIds]]:
        """Token ids of B captions for each decoding; see `models.interface`."""
        return self.generate_from(self.encode(photos), decodings, seeds)

    @torch.inference_mode()
    def generate_from(self, features: Tensor, decodings: Decodings, seeds: Seeds) -> dict[str, list[TokenIds]]:
        """The same from (B, P, D_image) features. All prefixes are equally long, so that nothing is padded."""
        lm, eos = causal_lm(self.decoder), self.tokenizer.eos_token_id
        prefix = self.prefix(features)
        # on a CPU a few photos at a time, so that what passes between layers stays in its caches
        parts = prefix.split(8) if prefix.device.type == "cpu" else [prefix]
        caches = [prefill(lm.base_model, inputs_embeds=part) for part in parts]
        # `generate` takes ids for all positions; those of the image are not read, since the cache holds them
        ids = torch.full((len(prefix), prefix.shape[1] + 1), eos, device=prefix.device)
        return generate_all(lm, caches, ids, decodings, seeds, [eos], ids.shape[1], attention_mask=torch.ones_like(ids))

    @torch.no_grad()
    def attend(
        self, photos: Sequence[LoadedPhoto], captions: Sequence[Sequence[TokenIds]], extra: Collection[str] = ()
    ) -> list[list[AttentionRecord]]:
        """What each token of each of a photo's captions attended to, the closing EOS last; one pass for all of them."""
        lm, eos = causal_lm(self.decoder), self.tokenizer.eos_token_id
        prefix = self.prefix(self.encode(photos))
        tokens, patches = prefix.shape[1], self.encoder.patch_rows_columns[0] * self.encoder.patch_rows_columns[1]
        columns = torch.arange(tokens - patches, tokens, device=prefix.device).expand(len(prefix), -1)  # no class token
        batch = pack_rows(captions, eos).to(prefix.device)
        rows = torch.arange(batch.labels.shape[1], device=prefix.device).expand(len(prefix), -1) + tokens
        with record_attention(lm.base_model, rows, columns, extra=extra) as recorder:
            packed_hidden(lm.base_model, prefix, batch)
        return read_records(recorder, lm.get_output_embeddings(), captions, eos)

    def patch_grid(self, width: int, height: int) -> PatchGrid:
        """Where the patches lie on a photo of `width` x `height` pixels."""
        return PatchGrid(*self.encoder.patch_rows_columns, self.encoder.transform.seen_box(width, height))

    def ids(self, text: str) -> list[int]:
        """Caption -> token ids, as in training."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: Sequence[int]) -> str:
        """Token ids -> caption, white space collapsed."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    def randomize(self) -> None:
        """Draw all weights anew; features of the trained encoder are forgotten."""
        randomize(self)
        self.encode = CachedEncoder(self.encoder)


def build_captioner(config: CaptionerConfig, load_weights: bool = True) -> Captioner:
    """A fresh captioner: random projector, LoRA that changes nothing yet. Without `load_weights` on the meta device."""
    encoder = build_encoder(config.encoder, load_weights)
    lm, tokenizer = load_decoder(config.decoder, load_weights)
    width_text = lm.get_input_embeddings().embedding_dim
    with torch.device("cpu" if load_weights else "meta"):
        projector = Projector(config.projector, encoder.width, width_text)
    return Captioner(encoder, projector, add_lora(lm, config.lora), tokenizer, config)
