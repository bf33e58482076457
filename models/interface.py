"""What the scripts ask of a model that writes captions and can be looked into: ours, and transformers' VLMs."""

from collections.abc import Collection, Sequence
from typing import Protocol

from data.photos import LoadedPhoto
from models.attention import AttentionRecord
from models.decoding import Decodings, Seeds, TokenIds
from models.encoder import PatchGrid


class CaptionModel(Protocol):
    """Implemented by `models.captioner.Captioner` and by `models.vlm.VisionLanguageModel`."""

    tokenizer: object
    """The tokenizer of transformers that belongs to the model."""

    def generate(self, photos: Sequence[LoadedPhoto], decodings: Decodings, seeds: Seeds) -> dict[str, list[TokenIds]]:
        """Captions of B photos by the name of the decoding, without the end token.

        Each photo is encoded and prefilled once for all decodings. `seeds` has B seeds for each decoding; a photo's
        caption depends on its seed and not on the other photos of the batch.
        """

    def attend(
        self, photos: Sequence[LoadedPhoto], captions: Sequence[Sequence[TokenIds]], extra: Collection[str] = ()
    ) -> list[list[AttentionRecord]]:
        """What each token of each of a photo's captions attended to, in one pass over the captions as given.

        `extra` has names of `models.attention.EXTRAS`: what costs more than that, and is made only when asked for.
        """

    def patch_grid(self, width: int, height: int) -> PatchGrid:
        """Where the image tokens lie on a photo of `width` x `height` pixels; UserError where that is not known."""

    def text(self, ids: Sequence[int]) -> str:
        """Token ids -> caption, white space collapsed."""

    def ids(self, text: str) -> TokenIds:
        """Caption -> token ids, without an end token."""

    def check_room(self, text_tokens: int, key: str) -> None:
        """Raise a UserError that names the setting `key` where so long a text does not fit."""

    def randomize(self) -> None:
        """Draw all weights anew: the control that has learnt nothing."""
