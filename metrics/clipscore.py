"""CLIPScore: how well a caption fits its photo, without references (Hessel et al. 2021, arXiv:2104.08718).

2.5 * max(cos(photo, caption), 0), here on the raw caption, as captioning courses compute it; the paper's own code
puts "A photo depicts " before it. RefCLIPScore is its harmonic mean with the caption's nearness to the references.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.config import UserError
from common.device import weights_hash
from models.hub import hub_or_cache, why

if TYPE_CHECKING:
    import torch

WEIGHT = 2.5


class ClipUnavailable(Exception):
    """The weights of the CLIP model cannot be had here; the message is one line that says why."""


class Clip(NamedTuple):
    """An open_clip model in float32 with the photo transform and the tokenizer that belong to it."""

    name: str
    model: "torch.nn.Module"
    transform: Any
    tokenizer: Any
    device: "torch.device"


def load_clip(name: str = "ViT-B-32-quickgelu", pretrained: str = "openai", device: Any = "cpu") -> Clip:
    """Load a model of open_clip: a built-in name with a tag or a weights file, or `local-dir:FOLDER` / `hf-hub:REPO`.

    Half precision would move scores by up to 1e-3, so weights are float32 everywhere. Raises UserError where name,
    tag, file or folder is wrong, ClipUnavailable where the weights would have to come from a hub that cannot be had.
    """
    import open_clip
    import torch

    named = not name.startswith(("local-dir:", "hf-hub:"))  # those two bring their own weights
    if named:
        _check_names(name, pretrained)
    label = f"{name}/{pretrained}" if named else name
    local = name.startswith("local-dir:") or (named and Path(pretrained).is_file())
    hub = True
    try:
        with hub_or_cache() as hub:
            model, _, transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained if named else None, device=device, precision="fp32", require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, huggingface_hub, torch and safetensors each raise their own kinds
        if local:
            raise UserError(f"clip_model: {name} could not be loaded: {why(error, hub=True)}") from error
        raise ClipUnavailable(f"no weights for {label}: {why(error, hub)}") from error
    return Clip(label, model.eval(), transform, tokenizer, torch.device(device))


def _check_names(name: str, pretrained: str) -> None:
    import open_clip

    models = open_clip.list_models()
    if name not in models:
        near = difflib.get_close_matches(name, models, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        expected = "a model of open_clip, local-dir:FOLDER or hf-hub:REPO"
        raise UserError(f"clip_model: expected {expected}, got {name!r}{hint}")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"clip_pretrained: expected a weights file or a tag of {name} ({tags}), got {pretrained!r}")
    # open_clip only warns of this, and then scores with the right weights under the wrong activation
    quick = open_clip.get_model_config(name).get("quick_gelu", False)
    if tag and tag.get("quick_gelu", False) != quick:
        right = name.removesuffix("-quickgelu") if quick else name + "-quickgelu"
        raise UserError(f"clip_model: {pretrained!r} was trained with another activation than {name}; expected {right}")


def tokenize(clip: Clip, captions: Sequence[str]) -> tuple["torch.Tensor", list[bool]]:
    """Token ids (N, context length), and which captions were too long: those are cut, their end token is kept."""
    tokens = clip.tokenizer(list(captions))
    length = tokens.shape[1]
    # with room for one token more, only a caption that was cut reads differently
    longer = clip.tokenizer(list(captions), context_length=length + 1)[:, :length]
    return tokens, (tokens != longer).any(dim=1).tolist()


def encode_captions(clip: Clip, tokens: "torch.Tensor", batch_size: int = 32) -> "torch.Tensor":
    """Unit vectors (N, D) of token ids (N, context length), captions of like length together.

    A causal text tower reads nothing behind the end token, so a batch is trimmed to its longest caption: captions
    have some 14 tokens of 77, and the difference is rounding.
    """
    import open_clip
    import torch
    from torch.func import functional_call

    model = clip.model
    trims = isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax" and model.attn_mask is not None
    lengths = tokens.argmax(dim=1) + 1 if trims else torch.full((len(tokens),), tokens.shape[1])
    order = lengths.argsort(stable=True)
    vectors = []
    with torch.inference_mode():
        for rows in order.split(batch_size):
            length = int(lengths[rows].max())
            text = tokens[rows, :length].to(clip.device)
            if trims:
                short = {
                    "positional_embedding": model.positional_embedding[:length],
                    "attn_mask": model.attn_mask[:length, :length],
                }
                vectors.append(functional_call(model, short, kwargs={"text": text})[1])
            else:
                vectors.append(model.encode_text(text, normalize=True))
    return torch.cat(vectors)[order.argsort().to(clip.device)]


class PhotoSide:
    """A CLIP's photo tower in the form that `data.features` caches: unit vectors, one token of D a photo."""

    tokens = 1

    def __init__(self, clip: Clip):
        self.clip, self.transform, self.device = clip, clip.transform, clip.device
        self.width = encode_captions(clip, tokenize(clip, [""])[0]).shape[1]  # open_clip's models name it in many ways

    def fingerprint(self) -> str:
        """Hash of all that decides a vector: architecture, transform and every weight of the photo tower."""
        tower = self.clip.model.visual
        return weights_hash(re.sub(r" at 0x[0-9a-f]+", "", f"CLIPScore {self.transform} {tower}"), tower)

    def __call__(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """(B, 3, H, W) -> (B, 1, D)"""
        import torch

        with torch.inference_mode():
            return self.clip.model.encode_image(pixels, normalize=True)[:, None]


def clip_scores(photos: "torch.Tensor", captions: "torch.Tensor") -> "torch.Tensor":
    """CLIPScore (N,), from 0 to 2.5, of N photos and their captions as unit vectors (N, D)."""
    return WEIGHT * (photos * captions).sum(dim=1).clamp(min=0)


def ref_clip_scores(
    scores: "torch.Tensor", captions: "torch.Tensor", references: Sequence["torch.Tensor"]
) -> "torch.Tensor":
    """RefCLIPScore (N,) from CLIPScore (N,), captions (N, D) and each photo's references (K, D)."""
    import torch

    near = torch.stack([(own @ caption).max() for own, caption in zip(references, captions)]).clamp(min=0)
    return 2 * scores * near / (scores + near).clamp(min=torch.finfo(scores.dtype).tiny)
