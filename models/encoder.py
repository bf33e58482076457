"""The frozen image encoder: photos in, patch features out, and where each patch lies on the photo.

timm and open_clip build the networks; this file gives both one form: (B, 3, H, W) pixels -> (B, P, D) features.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch import Tensor, nn

from common.config import UserError
from common.device import module_hash
from models import packaged
from models.hub import check_open_clip, loading


@dataclass(frozen=True)
class EncoderConfig:
    """Which frozen network sees the photo, and what is taken from it."""

    library: Literal["open_clip", "timm"] = "open_clip"
    """Who builds the network."""
    model: str = "ViT-L-14-quickgelu"
    """The library's name of the architecture."""
    weights: str = "openai"
    """A hub tag of the library, a local file or folder, pip:PACKAGE, or random (for benchmarks)."""
    layer: int = -1
    """Block whose output is taken, before any final norm; -1 is the last."""
    class_token: bool = True
    """Keep the class token (and registers) in front of the patches, where the network has them."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: as the network's own transform; squash: the whole photo, its shape forced to the network's square."""
    pool: PositiveInt = 1
    """Average k x k neighbouring patches into one, for this k; the class token stays as it is."""


@dataclass(frozen=True)
class PatchGrid:
    """Where a grid of patches lies on a photo: the seen box (left, top, right, bottom) in photo pixels, cut evenly."""

    rows: int
    columns: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class PhotoTransform:
    """What happens to a photo before the network sees it, and its inverse for geometry.

    `resized`: the short edge in pixels before the centre crop to `size`; None squashes both edges to `size`.
    """

    size: int
    resized: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __call__(self, photo: Image.Image) -> Tensor:
        """RGB photo -> (3, size, size) float32, normalised."""
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

        resize = Resize(self.resized or (self.size, self.size), InterpolationMode(self.interpolation))
        return Compose([resize, CenterCrop(self.size), ToTensor(), Normalize(self.mean, self.std)])(photo)

    def seen_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The box (left, top, right, bottom) of a photo, in its pixels, that the network sees."""
        if self.resized is None:
            return 0.0, 0.0, float(width), float(height)
        short = min(width, height)
        new = [self.resized if edge == short else int(self.resized * edge / short) for edge in (width, height)]
        start = [round((edge - self.size) / 2.0) for edge in new]  # CenterCrop's rounding
        x, y = width / new[0], height / new[1]
        return start[0] * x, start[1] * y, (start[0] + self.size) * x, (start[1] + self.size) * y


class FrozenEncoder(nn.Module):
    """A network of timm or open_clip that never trains. Build it with `build_encoder`."""

    def __init__(self, net: nn.Module, transform: PhotoTransform, config: EncoderConfig):
        super().__init__()
        self.net, self.transform, self.config = net.eval().requires_grad_(False), transform, config
        pixels = torch.zeros(1, 3, transform.size, transform.size, device=self.device)
        rows, columns = self.maps(pixels)[0].shape[-2:]
        if rows % config.pool or columns % config.pool:  # pooling would leave a remainder out
            raise UserError(f"encoder.pool: expected a divisor of {rows} x {columns} patches, got {config.pool}")
        self.patch_rows_columns = rows // config.pool, columns // config.pool
        _, self.tokens, self.width = self(pixels).shape  # read off the network, never set by hand

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> patch map (B, D, rows, columns) and prefix tokens (B, T, D), None where there are none."""
        options = {"indices": [self.config.layer], "output_fmt": "NCHW", "intermediates_only": True}
        if self.config.library == "open_clip":
            out = self.net.forward_intermediates(pixels, output_extra_tokens=True, **options)
            return out["image_intermediates"][0], (out.get("image_intermediates_prefix") or [None])[0]
        if getattr(self.net, "num_prefix_tokens", 0):
            return self.net.forward_intermediates(pixels, return_prefix_tokens=True, **options)[0]
        if self.config.layer == -1 and hasattr(self.net, "conv_head"):
            # an EfficientNet's widest map comes after its last block, where forward_intermediates ends
            return self.net.forward_features(pixels), None
        return self.net.forward_intermediates(pixels, **options)[0], None

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, D): class token and registers where kept, then the patches row by row."""
        patches, prefix = self.maps(pixels)
        patches = nn.functional.avg_pool2d(patches, self.config.pool)
        tokens = patches.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, rows * columns, D)
        if prefix is None or not self.config.class_token:
            return tokens
        return torch.cat([prefix, tokens], dim=1)

    def fingerprint(self) -> str:
        """Hash of all that decides a feature: architecture, settings, transform and every weight."""
        return module_hash(repr((self.config, self.transform)), self.net)


def build_encoder(config: EncoderConfig, load_weights: bool = True) -> FrozenEncoder:
    """Build the encoder of `config`; without `load_weights` on the meta device: shapes alone, no network.

    Raises UserError where the architecture, the layer or the weights are not to be had.
    """
    device = "cpu" if load_weights else "meta"
    build = _open_clip_tower if config.library == "open_clip" else _timm_net
    local = config.weights == "random" or config.weights.startswith(packaged.PREFIX) or os.path.exists(config.weights)
    what = f"encoder: {config.library} gives no {config.model} with weights {config.weights} and layer {config.layer}"
    with loading(what, local or not load_weights):
        return FrozenEncoder(*build(config, device, load_weights), config)


def check_encoder(config: EncoderConfig) -> list[str]:
    """What can be seen to be wrong with `config` before any weights are read; UserError for a packaged file."""
    if config.weights.startswith(packaged.PREFIX):
        packaged.encoder_file(config.weights, config.model)
    elif "/" in config.weights and not os.path.exists(config.weights):
        return [f"encoder.weights: {config.weights}: no such file or folder"]
    return []


def _open_clip_tower(config: EncoderConfig, device: str, load_weights: bool) -> tuple[nn.Module, PhotoTransform]:
    import open_clip

    model = f"local-dir:{config.weights}" if os.path.isdir(config.weights) else config.model
    needed = load_weights and config.weights != "random"
    tag = config.weights if needed and model == config.model else None  # a folder brings its own
    check_open_clip("encoder.weights", model, config.weights)
    clip = open_clip.create_model(model, tag, load_weights=load_weights, require_pretrained=needed, device=device)
    cfg = clip.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    if config.resize == "crop" and cfg["resize_mode"] == "longest":
        raise UserError(f"encoder.resize: {model} pads its photos, which is not supported; use squash")
    resized = size if config.resize == "crop" and cfg["resize_mode"] == "shortest" else None
    return clip.visual, PhotoTransform(size, resized, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"])


def _timm_net(config: EncoderConfig, device: str, load_weights: bool) -> tuple[nn.Module, PhotoTransform]:
    import timm

    weights, packed = config.weights, config.weights.startswith(packaged.PREFIX)
    file, folder = os.path.isfile(weights), os.path.isdir(weights)
    pretrained = load_weights and not (packed or file or weights == "random")
    tag = f".{weights}" if pretrained else ""
    model = f"local-dir:{weights}" if folder else config.model + tag
    with torch.device("meta" if packed else device):  # packed weights replace all tensors
        net = timm.create_model(model, pretrained=pretrained)
    net.reset_classifier(0)
    if load_weights and packed:
        packaged.load_encoder(net, weights, model)
    elif load_weights and file:
        classifier = net.pretrained_cfg["classifier"] or ()  # a name, or several
        stored = timm.models.load_state_dict(weights)
        net.load_state_dict({name: tensor for name, tensor in stored.items() if not name.startswith(classifier)})
    cfg = timm.data.resolve_model_data_config(net)
    size = cfg["input_size"][-1]
    resized = math.floor(size / cfg["crop_pct"]) if config.resize == "crop" else None
    return net, PhotoTransform(size, resized, cfg["mean"], cfg["std"], cfg["interpolation"])
