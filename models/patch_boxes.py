"""Where image tokens lie on a photo: measured on the model itself, whatever its processor crops, pads, tiles or merges.

Grey ramps go through the processor, so that each value that the network reads tells its place on the photo. Then each
patch of the vision tower sees only itself, and gradients tell which image token reads which value.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data.photos import LoadedPhoto, Photo
from models.attention import AttentionRecord
from models.decoder import attend_with
from models.encoder import PatchGrid

ALONE = "each_patch_alone"  # our name for it in transformers' registry


def _alone(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    return value.transpose(1, 2).contiguous(), None


AttentionInterface.register(ALONE, _alone)
AttentionMaskInterface.register(ALONE, sdpa_mask)


class _Reached(Exception):
    """Ends a model's pass where its language model begins."""


def image_embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(N, D) what the language model reads at the N image tokens of `inputs`."""

    def stop(module, args, kwargs):
        raise _Reached(kwargs["inputs_embeds"])

    with model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True):
        try:
            model(**inputs)
        except _Reached as reached:
            return reached.args[0][inputs["input_ids"] == model.config.image_token_id]


def _readers(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The number of the image token that reads each value of `pixel_values`, -1 where none does; how many there are.

    The bits of a token's number weigh its gradient: with log2(N) backward passes, those of all N tokens are told apart.
    """
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(inputs["pixel_values"].shape, generator=draw).to(model.device, model.dtype).requires_grad_()
    with attend_with(model, {"vision_config": ALONE}, after={"vision_config": "sdpa"}):
        tokens = image_embeddings(model, inputs | {"pixel_values": pixels})
    scores = tokens.float() @ torch.randn(tokens.shape[1], generator=draw).to(tokens.device)
    numbers = torch.arange(len(scores), device=scores.device)
    weights = [torch.ones_like(scores), *((numbers >> bit & 1).float() for bit in range(len(scores).bit_length()))]
    whole, *bits = (torch.autograd.grad(scores @ weight, pixels, retain_graph=True)[0].float() for weight in weights)
    owner = sum((bit / whole > 0.5).long() << place for place, bit in enumerate(bits))
    return owner.clamp(max=len(scores) - 1).masked_fill(whole == 0, -1), len(scores)


def measure_boxes(model: nn.Module, inputs: Callable, width: int, height: int) -> np.ndarray:
    """(N, 4) boxes (left, top, right, bottom) of a photo's image tokens, in its pixels; NaN where a token has none.

    Tokens that end a row have no box, nor have those that see only padding. `inputs([photo])` is what `model` reads.
    """

    def inputs_of(grey: np.ndarray | int) -> dict[str, Tensor]:
        grey = np.broadcast_to(np.round(grey), (height, width)).astype(np.uint8)
        return inputs([LoadedPhoto(Photo("grey", None), Image.fromarray(grey).convert("RGB"), "grey")])

    with torch.inference_mode(False), torch.enable_grad():
        owner, count = _readers(model, inputs_of(0))
    greys = 0, 255, np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    black, white, across, down = (inputs_of(grey)["pixel_values"].float() for grey in greys)
    seen = (white - black).abs()
    used = (seen > seen.max() / 2) & (owner >= 0)  # more photo than padding
    owner = owner[used].cpu().numpy()
    values = np.bincount(owner, minlength=count)
    edges = []
    for ramp, size in ((across, width), (down, height)):
        at = ((ramp - black) / (white - black))[used].cpu().numpy() * (size - 1.0) + 0.5
        mean, square = (np.bincount(owner, at**power, count) / np.where(values, values, np.nan) for power in (1, 2))
        rounding = ((size - 1) / 255) ** 2 / 12  # what 256 steps of grey add to a variance (Sheppard's correction)
        half = np.sqrt(3 * (square - mean**2 - rounding).clip(1e-6))  # of evenly spread values
        edges.append([(mean - half).clip(0, size), (mean + half).clip(0, size)])
    return np.stack([edge for pair in zip(*edges) for edge in pair], axis=1)


def _overlaps(boxes: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """(N, 4) boxes -> (N, P) the share of each that lies in each cell of the grid."""
    left, top, right, bottom = grid.box
    shares = []
    for axis, edges in ((1, np.linspace(top, bottom, grid.rows + 1)), (0, np.linspace(left, right, grid.columns + 1))):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        inside = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
        shares.append(np.nan_to_num(inside.clip(min=0) / (high - low)))
    return (shares[0][:, :, None] * shares[1][:, None, :]).reshape(len(boxes), -1)


def grid_of(boxes: np.ndarray) -> tuple[PatchGrid, np.ndarray]:
    """(N, 4) boxes -> one grid over all of them, and (N, P) the share of each box that lies in each of its P cells.

    Boxes that fill a grid, one for each cell, are its cells. Of several views of a photo the cells are as large as the
    median box, which is one of the finest view.
    """
    real = boxes[~np.isnan(boxes[:, 0])]
    box = (*real[:, :2].min(axis=0).tolist(), *real[:, 2:].max(axis=0).tolist())
    wide, tall = np.median(real[:, 2:] - real[:, :2], axis=0)
    rows, columns = max(1, round((box[3] - box[1]) / tall)), max(1, round((box[2] - box[0]) / wide))
    for shape in itertools.product((rows - 1, rows, rows + 1), (columns - 1, columns, columns + 1)):  # as estimated
        if np.prod(shape) == len(real):
            filled = _overlaps(boxes, PatchGrid(*shape, box)) > 0.8
            if filled.any(axis=0).all():
                return PatchGrid(*shape, box), filled.astype(float)
    return PatchGrid(rows, columns, box), _overlaps(boxes, PatchGrid(rows, columns, box))


def on_grid(record: AttentionRecord, share: np.ndarray) -> AttentionRecord:
    """A record of N image tokens -> of the P cells of `share` (N, P): attention adds up, logits are averaged."""
    count, share = len(share), share.astype(np.float32)
    level = share / np.maximum(share.sum(axis=0), 1e-12)
    made = {"mean": record.mean, "peak": record.peak, "lens": record.lens} | record.extra
    for name, values in made.items():
        made[name] = values[..., :count] @ (level if name in ("lens", "gradcam") else share)
    extra = {name: made.pop(name) for name in record.extra}
    return replace(record, extra=extra, **made)
