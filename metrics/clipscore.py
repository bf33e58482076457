"""CLIPScore: how well a caption fits its photo, without references (Hessel et al. 2021, arXiv:2104.08718).

CLIPScore is 2.5 * max(cos(photo, caption), 0). Captioning courses give CLIP the caption as it is; the paper's own
code puts "A photo depicts " before it. PAC-S (Sarto et al. 2023, arXiv:2303.12112) is the same with weights of its own
and the factor 2. RefCLIPScore is the harmonic mean of CLIPScore and the caption's highest
cosine with a reference.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.config import NothingDone
from common.device import module_hash
from models.hub import check_open_clip, loading

WEIGHT = 2.5


class Clip(NamedTuple):
    """An open_clip model in float32 with its own photo transform and tokenizer."""

    model: torch.nn.Module
    transform: Any
    tokenizer: Any
    device: torch.device
    architecture: dict[str, Any] | None = None
    """open_clip's description of the model: widths, layers, heads, activation."""


def load_clip(name: str = "ViT-B-32-quickgelu", pretrained: str = "openai", device: Any = "cpu") -> Clip:
    """Load a model of open_clip: a built-in name with a tag or a weights file, or `local-dir:FOLDER` / `hf-hub:REPO`.

    Half precision changes scores by up to 1e-3, so the weights are always float32. Raises UserError where the name,
    tag, file or folder is wrong, and NothingDone where a hub has the weights but cannot be reached.
    """
    import open_clip

    label = name if name.startswith(("local-dir:", "hf-hub:")) else f"{name}/{pretrained}"
    # a file, or what brings its own weights, is no tag
    local = not open_clip.get_pretrained_cfg(name, pretrained) and not name.startswith("hf-hub:")
    with loading(f"clip_model: {label} could not be loaded", local, NothingDone):
        check_open_clip("clip_model", name, pretrained)
        model, transform = open_clip.create_model_from_pretrained(name, pretrained, "fp32", device)
        tokenizer = open_clip.get_tokenizer(name)
    return Clip(model.eval(), transform, tokenizer, torch.device(device), open_clip.get_model_config(name))


@torch.inference_mode()
def encode_captions(clip: Clip, captions: Sequence[str], batch_size: int = 32) -> tuple[Tensor, list[bool]]:
    """Unit vectors (N, D), and which captions were too long. Those are cut; their end token is kept."""
    tokens = clip.tokenizer(list(captions))
    # with room for one more token, only the ids of a caption that was cut are different
    longer = clip.tokenizer(list(captions), context_length=tokens.shape[1] + 1)
    batches = tokens.to(clip.device).split(batch_size)
    vectors = torch.cat([clip.model.encode_text(batch, normalize=True) for batch in batches])
    return vectors, (tokens != longer[:, :-1]).any(dim=1).tolist()


class ImageTower:
    """CLIP's image tower as an encoder whose features are cached: one token, the unit vector (D), for each photo."""

    tokens = 1

    def __init__(self, clip: Clip):
        self.clip, self.transform, self.device = clip, clip.transform, clip.device
        self.width = encode_captions(clip, [""])[0].shape[1]  # open_clip has no one name for it

    def fingerprint(self) -> str:
        """Hash of all that decides a vector: architecture, preprocessing and every weight of the image tower."""
        from open_clip import get_model_preprocess_cfg

        inputs = {"architecture": self.clip.architecture, "preprocessing": get_model_preprocess_cfg(self.clip.model)}
        return module_hash("CLIPScore " + json.dumps(inputs, sort_keys=True, default=str), self.clip.model.visual)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, D)"""
        return self.clip.model.encode_image(pixels, normalize=True)[:, None]


def clip_scores(photos: Tensor, captions: Tensor, scale: float = WEIGHT) -> Tensor:
    """CLIPScore (N,), from 0 to `scale`, of the unit vectors (N, D) of N photos and their captions."""
    return scale * (photos * captions).sum(dim=1).clamp(min=0)


def ref_clip_scores(scores: Tensor, captions: Tensor, references: Sequence[Tensor]) -> Tensor:
    """RefCLIPScore (N,) from CLIPScore (N,), captions (N, D) and the references (K, D) of each photo."""
    nearest = torch.stack([(vectors @ caption).max() for vectors, caption in zip(references, captions)]).clamp(min=0)
    return 2 * scores * nearest / (scores + nearest).clamp(min=torch.finfo(scores.dtype).tiny)
