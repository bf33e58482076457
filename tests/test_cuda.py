"""Each script on a GPU, beside what it does on the CPU; skipped where there is none."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, HEATMAPS, build
from PIL import Image

import p1_llava_caption
import p2_inference
import p2_train
import p3_visualize
from common.files import JsonLines
from data.predictions import read_predictions
from models.decoding import Decoding
from models.training import Stage
from models.vlm import PROMPT, VisionLanguageModel

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("fresh_accelerate"),
]


@pytest.fixture
def train(data_root, captioner_config, tmp_path):
    """`train(name, ...)` -> the run's folder: one epoch of each stage on the tiny data and models."""

    def run(name: str, **changes):
        model = captioner_config()
        cfg = p2_train.Config(
            data=data_root, output=tmp_path / name, features=tmp_path / "features", batch_size=6, device="cuda",
            captions_per_row=3, encoder=model.encoder, decoder=model.decoder, lora=model.lora,
            align=Stage(epochs=1, lr=1e-2), finetune=Stage(epochs=2, lr=3e-3),
        )  # fmt: skip
        p2_train.main(dataclasses.replace(cfg, **changes))
        return tmp_path / name

    return run


def losses(run) -> list[float]:
    return [row["val_loss"] for row in JsonLines(run / "metrics.jsonl").rows() if "val_loss" in row]


def test_cuda_training_has_the_losses_of_the_cpu(train):
    from accelerate.state import AcceleratorState

    expected = losses(train("cpu", device="cpu"))
    for precision, tolerance in (("float32", 1e-4), ("bf16", 0.05), ("fp16", 0.05)):
        AcceleratorState._reset_state(reset_partial_state=True)
        found = losses(train(precision, precision=precision))
        print(precision, found, expected)
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("precision, saves", [("float32", 1), ("bf16", 2), ("fp16", 3)])
def test_cuda_resume_inside_an_epoch_is_an_unbroken_run(train, monkeypatch, precision, saves):
    from accelerate.state import AcceleratorState

    train = partial(train, precision=precision, ema=0.9, save_steps=1)
    whole = losses(train("whole"))

    class Killed(Exception):
        pass

    save, seen = p2_train.Trainer.save_last, iter(range(100))

    def save_and_die(trainer, *args):
        save(trainer, *args)
        if trainer.state["stage"] == "finetune" and next(seen) + 1 == saves:
            raise Killed

    monkeypatch.setattr(p2_train.Trainer, "save_last", save_and_die)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(Killed):
        train("broken")
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(train("broken", resume=True)) == pytest.approx(whole, rel=1e-5)


def test_cuda_captions_are_those_of_the_cpu(train, data_root, tmp_path):
    run, captions = train("run"), {}
    for device in ("cpu", "cuda"):
        for decoding in ({}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.9, "top_k": 20}):
            output = tmp_path / f"{device}{len(decoding)}.json"
            p2_inference.main(
                p2_inference.Config(
                    run, data_root / "images" / "val", output, device=device, features=tmp_path / "none",
                    decoding=p2_inference.Decoding(max_new_tokens=12, **decoding),
                )
            )  # fmt: skip
            captions[device, len(decoding)] = read_predictions(output)
    assert all(captions["cpu", n] == captions["cuda", n] for n in (0, 1, 3))
    for precision in ("bf16", "fp16"):
        p2_inference.main(
            p2_inference.Config(
                run, data_root / "images" / "val", tmp_path / f"{precision}.json", precision=precision, device="cuda"
            )
        )


def test_cuda_llava_captions_are_those_of_the_cpu(llava_folder, data_root, tmp_path):
    captions = {}
    for name, device, precision in (("cpu", "cpu", "float32"), ("cuda", "cuda", "float32"), ("auto", "auto", "auto"),
                                    ("fp16", "cuda", "fp16")):  # fmt: skip
        p1_llava_caption.main(
            p1_llava_caption.Config(
                data_root / "images" / "val", tmp_path / f"{name}.json", model=str(llava_folder), device=device,
                precision=precision, decoding=["best", "moderate", "diverse"],
            )
        )  # fmt: skip
        captions[name] = [read_predictions(tmp_path / f"{name}.{one}.json") for one in ("best", "moderate", "diverse")]
    assert captions["cuda"] == captions["cpu"]


def test_cuda_heatmaps_are_those_of_the_cpu(train, llava_folder, data_root, tmp_path):
    run = train("run")
    photos = data_root / "images" / "val"
    for source in ({"checkpoint": run}, {"model": str(llava_folder)}):
        name = next(iter(source))
        pages = {}
        for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bf16")):
            output = tmp_path / f"{name}_{device}_{precision}"
            p3_visualize.main(p3_visualize.Config(photos, output, device=device, precision=precision, **source))
            pages[device, precision] = (output / "index.html").read_text()
        assert len(pages) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_families_are_those_of_the_cpu(name, as_photos, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions of patches are rounded by default
    if name == "smolvlm":
        pytest.importorskip("num2words")
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(2)]
    photos = as_photos([image.resize(size) for image, size in zip(coarse, [(120, 90), (60, 110)])])
    decodings = {"greedy": Decoding(8), "sampled": Decoding(8, do_sample=True), "beams": Decoding(8, num_beams=2)}
    found, records = {}, {}
    for device in ("cpu", "cuda"):
        model, processor = build(name)
        vlm = VisionLanguageModel(model.to(device), processor, PROMPT)
        found[device] = vlm.generate(photos, decodings, dict.fromkeys(decodings, range(2)))
        if name in HEATMAPS:
            captions = [[caption[:4]] for caption in found["cpu"]["greedy"]]
            records[device] = [record for own in vlm.attend(photos, captions) for record in own]
    assert found["cuda"] == found["cpu"]
    for one, other in zip(*records.values()) if records else ():
        np.testing.assert_allclose(one.mean, other.mean, atol=1e-4)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
