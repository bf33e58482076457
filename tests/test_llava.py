"""LLaVA with random weights of real geometry, 336 px and 576 image tokens, against a plain script with `generate`."""

import json

import pytest
import torch
from PIL import Image

import p1_llava_caption
from common import UserError
from data.annotations import find_photos
from data.images import open_photo
from data.predictions import read_predictions

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory, tokenizer):
    """A random LLaVA of two narrow layers, saved as transformers saves it."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=16, **shape)
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **shape)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-2)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.5)  # captions differ by photo
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**size), tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for number in range(8):
        pixels = torch.randint(256, (6, 8, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((120, 90)).save(folder / f"p{number}.png")
    return folder


def caption(llava_folder, photos, output, **settings) -> None:
    p1_llava_caption.main(
        p1_llava_caption.Config(photos, output, model=str(llava_folder), device="cpu", precision="float32", **settings)
    )


@torch.inference_mode()
def test_greedy_captions_are_those_of_a_plain_script(llava_folder, photos, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(llava_folder)
    prompt = "USER: <image>\nProvide a one-sentence caption for the provided image. ASSISTANT:"
    plain = {}
    for photo in find_photos(photos):
        inputs = processor(images=open_photo(photo.path), text=prompt, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
        ids = model.generate(**inputs, max_new_tokens=50, do_sample=False)
        text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        plain[photo.stem] = " ".join(text.split())
    assert len(set(plain.values())) > 4
    for size in (1, 5, 8):
        caption(llava_folder, photos, tmp_path / f"{size}.json", batch_size=size)
        assert read_predictions(tmp_path / f"{size}.json") == plain


def test_sampled_captions_heed_neither_batch_nor_break(llava_folder, photos, tmp_path, monkeypatch):
    presets = ["best", "moderate", "diverse"]
    caption(llava_folder, photos, tmp_path / "whole.json", batch_size=8, decoding=presets)
    looks = []
    inputs = p1_llava_caption.load_llava.__globals__["Llava"].inputs

    def stop_at_the_third(self, images):
        looks.append(len(images))
        if len(looks) == 3:
            raise KeyboardInterrupt
        return inputs(self, images)

    monkeypatch.setattr("models.llava.Llava.inputs", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        caption(llava_folder, photos, tmp_path / "broken.json", batch_size=3, decoding=presets)
    caption(llava_folder, photos, tmp_path / "broken.json", batch_size=2, decoding=presets)
    assert looks == [3, 3, 2, 2]  # each photo is looked at once for all three decodings
    for name in presets:
        whole, broken = (tmp_path / f"{run}.{name}.json" for run in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes()
        meta = json.loads(whole.with_name(f"whole.{name}.meta.json").read_text())
        assert meta["decoding"]["name"] == name and meta["prompt"].startswith("Provide a one-sentence")
    captions = [read_predictions(tmp_path / f"whole.{name}.json") for name in presets]
    assert captions[0] != captions[1] != captions[2]


@pytest.mark.parametrize("settings, message", [
    ({"model": "./nowhere"}, "model: nowhere: expected a hub id or a model folder"),
    ({"decoding": ["best", "best"]}, "decoding: expected different names"),
    ({"quantize": "4bit"}, "quantize: 4bit needs a CUDA GPU, the device is cpu"),
    ({"model": "llava-hf/llava-1.5-7b-hf"}, "model: could not load llava-hf/llava-1.5-7b-hf: the hub does not answer"),
])  # fmt: skip
def test_mistakes_end_in_one_line(photos, tmp_path, settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        p1_llava_caption.main(p1_llava_caption.Config(photos, tmp_path / "x.json", device="cpu", **settings))
