"""From patch features to the decoder's word space: the file to edit for a projector of your own.

A projector maps (B, P, D_image) -> (B, P, D_text) and is named in `PROJECTORS`.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


def linear(width_image: int, width_text: int) -> nn.Module:
    return nn.Linear(width_image, width_text)


def mlp(width_image: int, width_text: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_image, width_text), nn.GELU(), nn.Linear(width_text, width_text))


PROJECTORS = {"linear": linear, "mlp": mlp}


@dataclass(frozen=True)
class ProjectorConfig:
    """What lies between the encoder and the decoder."""

    kind: Literal[tuple(PROJECTORS)] = "linear"
    """linear: one layer with bias; mlp: LLaVA-1.5's two layers with a GELU between (arXiv 2310.03744)."""
    normalize: bool = False
    """Bring each patch feature to zero mean and unit variance first (no parameters of its own)."""


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, width_image: int, width_text: int):
        super().__init__()
        self.norm = nn.LayerNorm(width_image, elementwise_affine=False) if config.normalize else nn.Identity()
        self.layers = PROJECTORS[config.kind](width_image, width_text)

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, D_image) -> (B, P, D_text)"""
        weight = next(self.layers.parameters())
        features = features.to(weight.device, weight.dtype)  # cached ones come from disk, in half precision
        return self.layers(self.norm(features))
