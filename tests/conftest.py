"""Tiny random models in the forms that their libraries load, a tiny captioned data set, and a captioner of both."""

import dataclasses
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported: no test downloads
os.environ["CAPTION_FEATURES"] = tempfile.mkdtemp(prefix="features")  # the tests share features with nobody else

from common.files import write_json
from models.captioner import Captioner, CaptionerConfig, build_captioner
from models.decoder import DecoderConfig, LoraConfig
from models.encoder import EncoderConfig

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
}
CAPTIONS = (
    "a {0} box on a {1} wall", "the {0} thing", "there is one {0} square that lies on a wide and {1} field of colour",
    "{0} upon {1}", "a photo of a {0} box", "something {1} all around a small {0} box in the middle of it",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["CAPTION_FEATURES"])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photos and tokenizer files, which does not come with the project."""
    if "CAPTION_DATA" not in os.environ:
        pytest.skip("CAPTION_DATA names no folder of real data")
    return Path(os.environ["CAPTION_DATA"])


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of 32 px photos, 16 patches and width 32, in open_clip's `local-dir:` form."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_file(open_clip.model.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    normal = {"mean": [0.5] * 3, "std": [0.25] * 3}
    write_json(folder / "open_clip_config.json", {"model_cfg": CLIP, "preprocess_cfg": normal})
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    from demo.standins import train_tokenizer

    return train_tokenizer([caption.format(one, two) for caption in CAPTIONS for one in COLOURS for two in COLOURS])


@pytest.fixture(scope="session")
def decoders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Random language models by name: gpt2 (Conv1D layers, head tied to the words) and llama (neither)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shared = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    shared["initializer_range"] = 0.2  # ten times the usual, so that no term is lost below the tolerance
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **shared)),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, **shared,
            )
        ),
    }  # fmt: skip
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """ROOT/{train,val}.json and ROOT/images/{train,val}: 8 + 4 drawn photos, each with 2 or 3 captions."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, count in (("train", 8), ("val", 4)):
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            box, wall = draw.sample(COLOURS, 2)
            width, height = draw.choice([(60, 40), (40, 60), (50, 50)])
            photo = Image.new("RGB", (width, height), wall)
            ImageDraw.Draw(photo).rectangle((i, 5, i + 25, 30), fill=box)
            images.append({"id": i, "file_name": f"{split}{i}.png"})
            photo.save(root / "images" / split / f"{split}{i}.png")
            texts = draw.sample(CAPTIONS, 2 + i % 2)
            annotations += [{"image_id": i, "caption": text.format(box, wall)} for text in texts]
        write_json(root / f"{split}.json", {"images": images, "annotations": annotations})
    return root


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> Path:
    """A random LLaVA of two narrow layers but real geometry, 576 image tokens, as transformers saves it."""
    from demo.standins import build_llava, llava_processor, train_llava_tokenizer

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shape | {"num_key_value_heads": 2, "initializer_range": 0.2}
    tokenizer = train_llava_tokenizer([*(caption.format(*COLOURS[:2]) for caption in CAPTIONS), "it's , - ."])
    torch.manual_seed(0)
    model = build_llava(tokenizer, shape | {"image_size": 336, "patch_size": 14}, text)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.5)  # captions differ by photo
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    llava_processor(tokenizer, image_size=336, patch_size=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def captioner_config(clip_folder, decoders) -> Callable[..., CaptionerConfig]:
    """`captioner_config("gpt2" or "llama", ...)` of the tiny models, LoRA of rank 4; keywords replace parts."""

    def config(decoder: str = "gpt2", **parts) -> CaptionerConfig:
        encoder = EncoderConfig(model="tiny", weights=str(clip_folder))
        lora = LoraConfig(rank=4, alpha=8)
        base = CaptionerConfig(encoder, decoder=DecoderConfig(str(decoders[decoder])), lora=lora)
        return dataclasses.replace(base, **parts)

    return config


@pytest.fixture(scope="session")
def as_photos() -> Callable[[list[Image.Image]], list]:
    """Images in memory as a script gets its decoded photos."""
    from data.photos import LoadedPhoto, Photo

    def load(images: list[Image.Image]) -> list[LoadedPhoto]:
        names = [f"photo{number}" for number in range(len(images))]
        return [
            LoadedPhoto(Photo(name, None), image, f"{name} {hash(image.tobytes())}")
            for name, image in zip(names, images)
        ]

    return load


@pytest.fixture(scope="session")
def caption() -> Callable[..., list[str]]:
    """`caption(captioner, features, decoding, seeds)`: captions of (B, P, D_image) features as text."""

    def write(captioner: Captioner, features: torch.Tensor, decoding, seeds=()) -> list[str]:
        captions = captioner.generate_from(features, {"caption": decoding}, {"caption": seeds})["caption"]
        return [captioner.text(ids) for ids in captions]

    return write


@pytest.fixture
def make_captioner(captioner_config) -> Callable[..., Captioner]:
    """`make_captioner("gpt2" or "llama", ...)`: as after training, with adapters that change something."""

    def make(decoder: str = "gpt2", **parts) -> Captioner:
        torch.manual_seed(1)
        captioner = build_captioner(captioner_config(decoder, **parts))
        for name, parameter in captioner.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            parameter.requires_grad_("lora_" in name or name.startswith("projector"))
        return captioner

    return make


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; a test that trains is a process of its own in this."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium behind its driver, both from PATH; tests that look at pages are skipped without them."""
    import shutil

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no chromium and chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*quiet.split(), "disable-component-update", "disable-sync", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, Service(driver))
    yield window
    window.quit()
