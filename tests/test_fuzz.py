"""Every reader on random and damaged files: a value or one line, never another exception, no long message, no hang.

`make fuzz` gives each reader 10,000 files; the test suite gives each a few from a fixed seed.
"""

import contextlib
import io
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import p2_train
from common.config import UserError, parse_config
from data.annotations import find_photos, read_annotations
from data.features import FeatureCache
from data.instances import read_instances
from data.journal import Journal
from data.photos import BadPhoto, Photo, load_photo
from data.predictions import read_predictions
from models.checkpoint import check_checkpoint, save_captioner
from models.run_folder import resumed_state

INPUTS = int(os.environ.get("FUZZ", "25"))
SLOW = INPUTS // (1 if "FUZZ" in os.environ else 5)  # of readers that build a model each time
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
SQUARE = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}],
    "annotations": [SQUARE, SQUARE | {"segmentation": {"counts": [3, 70, 8], "size": [9, 9]}}],
    "categories": [{"id": 1, "name": "dog"}],
}
JOURNAL = [{"decoding": ["a"], "a": {"model": "m"}}, ["a", ["0", None], {"a": ["a dog", False]}]]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(
    ["id", "images", "caption", 10**30, -1, 1e308, float("nan"), "\ud800", "../../etc/passwd", "\x1b[2J", "a" * 5000]
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=9), part))


def photo(format: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 18), 90).convert("RGB").save(file, format)
    return file.getvalue()


SEEDS = {
    "photo": [photo(name) for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")],
    "annotations": [COCO, [{"image": "a.jpg", "caption": "a"}], b"image,caption\na.jpg,a dog\n", b"a.jpg#0\ta dog\n"],
    "predictions": [{"a": "a dog", "b": ""}],
    "instances": [INSTANCES],
    "journal": [b"".join(json.dumps(row).encode() + b"\n" for row in JOURNAL)],
    "settings": [b"seed: 1\nalign: {epochs: 1, lr: 1e-3}\nlora:\n  rank: 4\n"],
    "list": [b"a.jpg\nb.jpg\n"],
}  # fmt: skip


def put(value, draw) -> object:
    """The JSON `value` with another value at one random place."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 5)):
        copy = value.copy()
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        copy[key] = put(value[key], draw)
        if isinstance(value, dict) and not draw(st.integers(0, 9)):
            del copy[key]
        return copy
    return draw(VALUES)


@st.composite
def files(draw, seeds: list) -> bytes:
    """A sound file with something changed in it: a value, some bytes, or its end; or any bytes."""
    seed = draw(st.sampled_from(seeds))
    if not isinstance(seed, bytes):
        seed = json.dumps(put(seed, draw) if draw(st.integers(0, 3)) else seed).encode()
        if draw(st.booleans()):
            return seed
    start = draw(st.integers(0, len(seed)))
    length, middle = draw(st.sampled_from([0, 0, 1, 1, 4, len(seed)])), draw(st.binary(max_size=8))
    return seed[:start] + middle * draw(st.sampled_from([1, 1, 1, 1, 20_000])) + seed[start + length :]


@contextlib.contextmanager
def within_limits():
    """UserError with a message of 500 characters at most is the one exception; 5 s and 2 GB at most."""
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except UserError as error:
        text = str(error)
        assert len(text) <= 500 and text.isprintable(), text
    assert time.monotonic() - began < 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2e6, f"{grown} kB"


def read_masks(file: Path) -> None:
    instances = read_instances(file)
    for stem in instances.objects:
        instances.masks(stem)


READERS = {
    "photo": lambda file: load_photo(Photo("a", file)),
    "annotations": read_annotations,
    "predictions": read_predictions,
    "instances": read_masks,
    "journal": lambda file: Journal(file.with_name("x.json"), {"a": {"model": "m"}}),
    "settings": lambda file: parse_config(p2_train.Config, ["--config", str(file)]),
    "list": find_photos,
}


@pytest.mark.parametrize("name", READERS)
def test_readers(tmp_path, name, capsys):
    file = tmp_path / ("x.journal.jsonl" if name == "journal" else "file")

    @settings(max_examples=INPUTS, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(files(SEEDS[name]))
    def check(content):
        file.write_bytes(content)
        with within_limits():
            READERS[name](file)

    check()


def test_features(tmp_path):
    """Whatever the file holds: the array that was written, or nothing."""
    cache, array = FeatureCache(tmp_path, "f", (3, 4)), np.arange(12, dtype=np.float16).reshape(3, 4)
    cache.write("ab1", array)
    whole = cache._path("ab1").read_bytes()

    @settings(max_examples=INPUTS, deadline=None, derandomize=True, database=None)
    @given(files([whole]))
    def check(content):
        cache._path("ab1").write_bytes(content)
        with within_limits():
            found = cache.read("ab1")
            assert found is None if content != whole else np.array_equal(found, array)

    check()


def test_checkpoint_files(make_captioner, captioner_config, tmp_path):
    """Each file of a checkpoint and of a run in turn."""
    folder = tmp_path / "last"
    state = {"stage": "align", "epoch": 0, "step": 0, "steps": 0, "logged": 0, "rng": torch.get_rng_state()}
    save_captioner(make_captioner(), folder, extra={"trainer.pt": state})
    parts = captioner_config()
    cfg = p2_train.Config(encoder=parts.encoder, decoder=parts.decoder, lora=parts.lora, output=tmp_path, resume=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    names = ["captioner.json", "projector.safetensors", "decoder_lora/adapter_model.safetensors", "trainer.pt"]
    names += ["../config.yaml"]
    whole = {name: (folder / name).read_bytes() for name in names}

    @settings(max_examples=SLOW, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(names), st.data())
    def check(name, data):
        (folder / name).write_bytes(data.draw(files([whole[name]])))
        with within_limits():
            resumed_state(cfg) if name in ("trainer.pt", "../config.yaml") else check_checkpoint(folder)
        (folder / name).write_bytes(whole[name])

    check()


def test_bad_photo_is_a_user_error():
    assert issubclass(BadPhoto, UserError)
