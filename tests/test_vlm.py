"""LLaVA with random weights of real geometry, 336 px and 576 image tokens, against a plain script with `generate`."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

import p1_llava_caption
from common.config import NothingDone, UserError
from data.annotations import find_photos
from data.photos import load_photo
from data.predictions import read_predictions
from models import vlm
from models.decoding import Decoding, until_eos
from models.vlm import PROMPT, VisionLanguageModel, load_vlm


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


@pytest.mark.parametrize("prompt", ["<image> Describe it.", "USER: <image>\nWhat? ASSISTANT:", "<|image_pad|> What?"])
def test_a_prompt_with_a_place_for_the_photo_is_refused_before_the_model_loads(prompt):
    with pytest.raises(UserError, match="^prompt: expected the question alone"):
        load_vlm("nowhere", prompt, torch.device("cpu"), torch.float32)


TEMPLATES = {
    "broken": ("{% for message in %}", "could not load .*TemplateSyntaxError"),
    "endless": (
        "{% for a in range(99999) %}" * 3 + "{{ a }}" + "{% endfor %}" * 3,
        "its chat template takes more than 1 s",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_strangers_chat_template_ends_in_one_line(llava_folder, tmp_path, monkeypatch, name):
    template, expected = TEMPLATES[name]
    folder = shutil.copytree(llava_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(vlm, "time_limit", partial(vlm.time_limit, seconds=1))
    with pytest.raises(UserError, match=f"^model: {expected}"):
        load_vlm(str(folder), PROMPT, torch.device("cpu"), torch.float32)
    assert signal.alarm(0) == 0  # no alarm is left


def test_a_language_model_is_no_vision_language_model(decoders):
    with pytest.raises(UserError, match="^model: .*gpt2.* does not take photos and text; expected one that does$"):
        load_vlm(str(decoders["gpt2"]), PROMPT, torch.device("cpu"), torch.float32)


@torch.inference_mode()
def test_greedy_captions_are_those_of_a_plain_script(llava_folder, photos, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(llava_folder)
    prompt = "USER: <image> Provide a one-sentence caption for the provided image. ASSISTANT:"
    plain = {}
    for photo in find_photos(photos):
        inputs = processor(images=load_photo(photo).image, text=prompt, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
        ids = model.generate(**inputs, max_new_tokens=50, do_sample=False)
        text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        plain[photo.stem] = " ".join(text.split())
    assert len(set(plain.values())) > 4
    for size in (1, 5, 8):
        caption(llava_folder, photos, tmp_path / f"{size}.json", batch_size=size)
        assert read_predictions(tmp_path / f"{size}.json") == plain


@pytest.mark.parametrize("rules", [
    {"repetition_penalty": 1.5, "min_new_tokens": 9}, {"no_repeat_ngram_size": 1},
    {"num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
])  # fmt: skip
@torch.inference_mode()
def test_rules_against_repetition_are_those_of_plain_generate(llava_folder, photos, rules):
    from transformers import AutoModelForImageTextToText

    ours = load_vlm(str(llava_folder), PROMPT, torch.device("cpu"), torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.float32).eval()
    inputs = ours.inputs(loaded := [load_photo(photo) for photo in find_photos(photos, limit=2)])
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, **rules)[:, inputs["input_ids"].shape[1] :]
    decodings = {"plain": Decoding(12), "ruled": Decoding(12, **rules)}
    captions = ours.generate(loaded, decodings, dict.fromkeys(decodings, (0, 0)))
    assert captions["ruled"] == until_eos(ids, ours.eos) != captions["plain"]


def test_penalties_of_a_models_authors_do_not_act(llava_folder, photos, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 3.0}))
    loaded, found = [load_photo(photo) for photo in find_photos(photos, limit=2)], []
    for each in (llava_folder, folder):
        model = load_vlm(str(each), PROMPT, torch.device("cpu"), torch.float32)
        found.append(model.generate(loaded, {"greedy": Decoding(12)}, {"greedy": (0, 0)}))
    assert found[0] == found[1]


def test_sampled_captions_heed_neither_batch_nor_break(llava_folder, photos, tmp_path, monkeypatch):
    presets = ["best", "moderate", "diverse"]
    caption(llava_folder, photos, tmp_path / "whole.json", batch_size=8, decoding=presets)
    sizes, inputs = [], VisionLanguageModel.inputs

    def stop_at_the_third(self, photos):
        sizes.append(len(photos))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return inputs(self, photos)

    monkeypatch.setattr(VisionLanguageModel, "inputs", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        caption(llava_folder, photos, tmp_path / "broken.json", batch_size=3, decoding=presets)
    caption(llava_folder, photos, tmp_path / "broken.json", batch_size=2, decoding=presets)
    assert sizes == [3, 3, 2, 2]  # each photo is encoded once for all three decodings
    for name in presets:
        whole, broken = (tmp_path / f"{run}.{name}.json" for run in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes()
        meta = json.loads(whole.with_name(f"whole.{name}.meta.json").read_text())
        assert meta["decoding"]["name"] == name and meta["prompt"].startswith("Provide a one-sentence")
    captions = [read_predictions(tmp_path / f"whole.{name}.json") for name in presets]
    assert captions[0] != captions[1] != captions[2]


@pytest.mark.parametrize("settings, message", [
    ({"model": "./nowhere"}, "model: nowhere: expected a hub id or a model folder"),
    ({"model": "llava-hf/llava-1.5-7b-hf"}, "model: could not load llava-hf/llava-1.5-7b-hf: the hub does not answer"),
])  # fmt: skip
def test_mistakes_end_in_one_line(photos, tmp_path, settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        p1_llava_caption.main(p1_llava_caption.Config(photos, tmp_path / "x.json", device="cpu", **settings))


def test_quantized_weights_ask_for_bitsandbytes(llava_folder, photos, tmp_path):
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(UserError, match="^model: could not load .*requires bitsandbytes: `pip install"):
        caption(llava_folder, photos, tmp_path / "x.json", quantize="4bit")


# ------------------------------------------------------------------------------------------- as a user runs it

SCRIPT = Path(p1_llava_caption.__file__)


def command(llava_folder: Path, photos: Path, output: Path, *flags: str) -> list[str]:
    settings = ["--model", llava_folder, "--images", photos, "--output", output, "--device", "cpu", *flags]
    return [sys.executable, str(SCRIPT), *map(str, settings)]


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_five_kills_leave_no_trace(llava_folder, photos, tmp_path):
    """40 photos, SIGKILL at five random moments: the same JSON as an unbroken run's, byte for byte."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(40):
        (many / f"m{number:02}.png").symlink_to(photos / f"p{number % 8}.png")
    presets = ["best", "diverse"]
    caption(llava_folder, many, tmp_path / "whole.json", decoding=presets)
    draw = random.Random(0)
    journal = tmp_path / "broken.journal.jsonl"
    for moment in sorted(draw.sample(range(2, 36), 5)):  # lines of the journal
        run = subprocess.Popen(
            command(llava_folder, many, tmp_path / "broken.json", "--batch_size", "1", "--decoding", *presets),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while lines(journal) < moment and run.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL and moment <= lines(journal) < 41
    caption(llava_folder, many, tmp_path / "broken.json", decoding=presets)
    assert not journal.exists()
    for name in presets:
        assert (tmp_path / f"broken.{name}.json").read_bytes() == (tmp_path / f"whole.{name}.json").read_bytes()


def test_bad_photos_are_named_and_counted(llava_folder, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.open(photos / "p0.png").save(folder / "good.jpg", quality=95)
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no photo")
    (folder / "void.jpg").touch()
    Image.new("1", (20_000, 20_000)).save(folder / "vast.png")
    done = subprocess.run(command(llava_folder, folder, tmp_path / "x.json"), capture_output=True, text=True)
    assert done.returncode == 0 and "1 captions in" in done.stdout and "4 skipped" in done.stdout
    assert all(f"skipped {folder / name}: " in done.stderr for name in ("cut.jpg", "text.jpg", "void.jpg", "vast.png"))
    assert list(read_predictions(tmp_path / "x.json")) == ["good"]
    skipped = json.loads((tmp_path / "x.meta.json").read_text())["skipped"]
    assert set(skipped) == {"cut.jpg", "text.jpg", "void.jpg", "vast.png"}
    (folder / "good.jpg").unlink()
    with pytest.raises(NothingDone, match="none of 4 photos could be decoded"):  # exit code 3
        caption(llava_folder, folder, tmp_path / "y.json")
