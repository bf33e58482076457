"""A split made ready for training: its photos, their cached features and their tokenised captions, in one order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from common.config import check, say
from data.batches import Row
from data.features import Features
from data.photos import BadPhoto, Photo
from models.captioner import Captioner
from models.features import encode_files
from models.packing import PackedBatch, pack_rows


@dataclass
class Split:
    """N photos in one order."""

    photos: list[Photo]
    """Those that could be decoded."""
    features: Features
    """(N, P, D_image), read from disk as they are asked for."""
    captions: list[list[list[int]]]
    """Token ids of each photo's captions."""
    eos: int
    """The decoder's end token."""
    caption_weights: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Weight in the loss by (number of the photo, *token ids of the caption); without one it is 1."""

    def inputs(self, batch: Sequence[Row], pin: bool = False) -> tuple[Tensor, PackedBatch]:
        """Features of a batch's photos and its packed captions; `pin` them where they go to a GPU."""
        features = self.features[[photo for photo, _ in batch]]
        weights = [[self.caption_weights.get((photo, *ids), 1.0) for ids in captions] for photo, captions in batch]
        packed = pack_rows([captions for _, captions in batch], self.eos, weights=weights)
        return (features.pin_memory(), packed.pin_memory()) if pin else (features, packed)


def prepare_split(captioner: Captioner, photos: list[Photo], cache: Path, skip_bad_photos: bool = False) -> Split:
    """Encode `photos` (or read their features from the folder `cache`) and tokenise their captions.

    Raises UserError for captions longer than the decoder has positions for, and for photos that cannot be decoded;
    with `skip_bad_photos` they are named on stderr and left out. Raises NothingDone where no photo can be decoded.
    """
    ids = captioner.tokenizer([c for photo in photos for c in photo.captions], add_special_tokens=False).input_ids
    rest, room = iter(ids), captioner.room()
    captions = {photo.stem: [next(rest) for _ in photo.captions] for photo in photos}
    long = {stem for stem, own in captions.items() if max(map(len, own)) > room}
    reason = f"a caption has more than {room} tokens, for which the decoder has no positions"
    _leave_out([BadPhoto(photo.path, reason) for photo in photos if photo.stem in long], skip_bad_photos)
    photos = [photo for photo in photos if photo.stem not in long]
    features, good, bad = encode_files(captioner.encoder, photos, cache)
    _leave_out(bad, skip_bad_photos)
    photos, eos = [photos[i] for i in good], captioner.tokenizer.eos_token_id
    return Split(photos, features, [captions[photo.stem] for photo in photos], eos)


def _leave_out(bad: list[BadPhoto], allowed: bool) -> None:
    """Name on stderr the photos that training goes on without. Raises UserError where that is not `allowed`."""
    if bad and not allowed:
        check([f"photo {error}" for error in bad] + ["skip_bad_photos goes on without them"])
    for error in bad:
        say(f"skipped photo {error}")


def weigh_by_agreement(split: Split, agreement: dict[str, list[float]], power: float) -> None:
    """Weigh each caption by the `agreement` of its photo's captions to that power; the mean of a photo's is 1.

    The weighted cross-entropy of Phan et al. 2017, https://arxiv.org/abs/1712.09532, within each photo.
    """
    for number, captions in enumerate(split.captions):
        powers = [score**power for score in agreement[split.photos[number].stem]]
        mean = sum(powers) / len(powers)
        split.caption_weights |= {(number, *ids): one / mean if mean else 1.0 for ids, one in zip(captions, powers)}
