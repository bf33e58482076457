"""Damaged files, full disks and strangers' files: each ends in one line, and nothing that was done is lost."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import p1_llava_caption
import p2_inference
import p2_train
import p3_visualize
from common.config import UserError, one_line, parse_config
from common.device import pick_device
from data.annotations import find_photos, read_annotations
from data.journal import Journal
from data.photos import PhotoBatches, load_photo
from models.captioner import build_captioner
from models.checkpoint import LORA_WEIGHTS, PROJECTOR, checkpoint_hash, load_captioner, save_captioner
from models.decoder import DecoderConfig, load_decoder
from models.encoder import EncoderConfig, build_encoder
from models.features import CachedEncoder, encode, encode_files
from models.training import Stage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def trained(data_root, captioner_config, tmp_path_factory) -> p2_train.Config:
    """The settings of a run that has ended: half an epoch of each stage."""
    model, folder = captioner_config(), tmp_path_factory.mktemp("trained")
    half = Stage(epochs=0.5, lr=1e-2)
    cfg = p2_train.Config(
        data=data_root, output=folder / "run", features=folder / "features", device="cpu", batch_size=6,
        encoder=model.encoder, decoder=model.decoder, lora=model.lora, align=half, finetune=half,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    p2_train.main(cfg)
    return cfg


@pytest.fixture
def run(trained, tmp_path) -> p2_train.Config:
    """The same run, copied: it may be damaged."""
    shutil.copytree(trained.output, tmp_path / "run")
    return dataclasses.replace(trained, output=tmp_path / "run", resume=True)


def files_of(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".yaml")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def put(file: Path, **changes) -> None:
    torch.save(torch.load(file, weights_only=True) | changes, file)


# ------------------------------------------------------------------------------------------- damaged runs

RESUMED = {
    "state cut": (lambda f: half(f / "last/trainer.pt"), "resume: .*last or config.yaml is damaged"),
    "state empty": (lambda f: (f / "last/trainer.pt").write_bytes(b""), "resume: .* is damaged"),
    "state a list": (lambda f: torch.save([1], f / "last/trainer.pt"), "resume: .* is damaged"),
    "state of another stage": (lambda f: put(f / "last/trainer.pt", stage="pretrain"), "resume: .* is damaged"),
    "state without a place": (lambda f: put(f / "last/trainer.pt", step="a"), "resume: .* is damaged"),
    "another optimizer": (lambda f: put(f / "last/trainer.pt", epoch=0, optimizer={"a": 1}), "is of another run"),
    "weights cut": (lambda f: half(f / "last" / LORA_WEIGHTS), "expected a safetensors file"),
    "weights gone": (lambda f: (f / "last" / PROJECTOR).unlink(), "expected a safetensors file: No such file"),
    "log broken": (lambda f: (f / "metrics.jsonl").write_text('{}\n{"a\n{}\n'), "expected one JSON value"),
    "settings empty": (lambda f: (f / "config.yaml").write_text(""), "resume: .* is damaged"),
    "settings of aliases": (lambda f: (f / "config.yaml").write_text("a: &a 0\nb: *a"), "resume: .* is damaged"),
    "settings broken": (lambda f: (f / "config.yaml").write_bytes(b"\xff: [1"), "resume: .* is damaged"),
    "captioner.json deep": (lambda f: (f / "last/captioner.json").write_text("[" * 200_000), "expected the settings"),
    "captioner.json null": (
        lambda f: (f / "last/captioner.json").write_text('{"decoder": {"model": null}}'),
        "decoder.model: expected str, got nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_run_is_refused_in_one_line_and_left_as_it_is(run, name):
    damage, said = RESUMED[name]
    damage(run.output)
    before = files_of(run.output)
    with pytest.raises(UserError, match=said) as error:
        p2_train.main(run)
    assert len(str(error.value)) <= 500 and "weights_only" not in str(error.value)
    assert files_of(run.output) == before


def test_a_run_goes_on_with_its_own_photos_and_captions_alone(run, data_root, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data_root, moved)
    files = {"annotations": moved / "train.json", "images": moved / "images/train"}
    files |= {"val_annotations": moved / "val.json", "val_images": moved / "images/val"}
    p2_train.main(dataclasses.replace(run, data=None, **files))
    cfg = dataclasses.replace(run, data=moved)
    p2_train.main(cfg)
    shutil.copy(moved / "images/train/train1.png", moved / "images/train/train0.png")
    before = files_of(run.output)
    with pytest.raises(UserError, match="^resume: photos or captions are not those that the run began with"):
        p2_train.main(cfg)
    shutil.copy(data_root / "images/train/train0.png", moved / "images/train/train0.png")
    content = json.loads((moved / "train.json").read_text())
    content["annotations"].pop()
    (moved / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="^resume: photos or captions are not those that the run began with"):
        p2_train.main(cfg)
    assert files_of(run.output) == before


def test_what_a_killed_process_left_is_cleaned(run):
    (run.output / ".last.part").mkdir()
    (run.output / ".config.yaml.99999.part").write_text("half")
    (run.output / "best").rename(run.output / ".best.old")
    p2_train.main(dataclasses.replace(run, resume=False, overwrite=True))
    assert not [path.name for path in run.output.rglob("*") if path.suffix in (".part", ".old")]


# ------------------------------------------------------------------------------------------- features


def test_features_that_are_not_finite_name_their_photo(as_photos, clip_folder, monkeypatch):
    photos = as_photos([Image.new("RGB", (40, 40), colour) for colour in ("white", "black")])
    encoder = build_encoder(EncoderConfig(model="tiny", weights=str(clip_folder)))
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pixels: forward(pixels) + torch.tensor([0, 1e6])[:, None, None])
    with pytest.raises(UserError, match="^photo photo1: the encoder gives features that are too large"):
        encode(encoder, photos)


def test_a_checkpoint_is_another_where_its_local_decoder_has_changed(captioner_config, decoders, tmp_path):
    decoder = shutil.copytree(decoders["gpt2"], tmp_path / "gpt2")
    config = dataclasses.replace(captioner_config(), decoder=DecoderConfig(str(decoder)))
    save_captioner(build_captioner(config), tmp_path / "run")
    before = checkpoint_hash(tmp_path / "run")
    assert checkpoint_hash(tmp_path / "run") == before
    (decoder / "generation_config.json").write_text((decoder / "generation_config.json").read_text() + "\n")
    assert checkpoint_hash(tmp_path / "run") != before


def test_a_damaged_feature_is_encoded_anew_and_said(captioner_config, data_root, tmp_path, capsys):
    encoder = build_encoder(captioner_config().encoder)
    photos = find_photos(data_root / "images" / "train")
    features, good, _ = encode_files(encoder, photos, tmp_path)
    expected = features[good].clone()
    files = [features.cache._path(key) for key in features.keys]
    for number, change in enumerate((lambda b: b[:-10], lambda b: b[:50] + b"\xff\x7e" + b[52:], lambda b: b + b"0")):
        files[number].write_bytes(change(files[number].read_bytes()))  # cut, a NaN, longer
    files[3].unlink()
    reader = CachedEncoder(encoder, tmp_path)
    torch.testing.assert_close(reader([load_photo(photo) for photo in photos]), expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(features[good], expected, atol=2e-3, rtol=2e-3)
    assert capsys.readouterr().err.count("is damaged; its photo is encoded anew") == 2  # by each reader
    assert all(features.cache.read(key) is not None for key in features.keys)
    files[0].unlink()
    copied = Path(shutil.copy(photos[0].path, tmp_path))
    moved, *_ = encode_files(encoder, [dataclasses.replace(photos[0], path=copied)], tmp_path)
    files[0].unlink()
    Image.new("RGB", (9, 9)).save(copied)
    with pytest.raises(UserError, match="train0.png is another photo than when the run began"):
        moved[[0]]


# ------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("args, said", [
    ("--lora.rank 1000000000", "lora.rank: expected IntFrom1To16384"),
    ("--lora.dropout 1e400", "lora.dropout: expected ClosedUnitInterval"),
    ("--batch_size 1e20", "batch_size: expected PositiveInt"),
    ("--config DEEP", "config: .*deep.yaml: .*exceeded maximum"),
    ("--config OBJECT", "config: .*object.yaml: could not determine a constructor"),
    ("--encoder.weights " + "a" * 100_000, "too long|encoder"),
    ("--decoder !!python/object:os.system", "decoder"),
])  # fmt: skip
def test_settings_that_no_machine_takes(args, said, trained, tmp_path):
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 200_000)
    (tmp_path / "object.yaml").write_text("seed: !!python/object/apply:os.system ['touch ran']")
    words = args.replace("DEEP", str(tmp_path / "deep.yaml")).replace("OBJECT", str(tmp_path / "object.yaml")).split()
    model = ["--encoder.weights", trained.encoder.weights, "--decoder.model", trained.decoder.model]
    with pytest.raises((UserError, OSError), match=said) as error:  # `run` shows both in one line
        cfg = parse_config(
            p2_train.Config, [*model, "--data", str(trained.data), "--output", str(tmp_path / "o"), *words]
        )
        p2_train.main(cfg)
    assert len(one_line(error.value)) <= 500 and not (tmp_path / "o/config.yaml").exists() and not Path("ran").exists()


def test_meta_is_no_device():
    with pytest.raises(UserError, match="device: 'meta' is not available"):
        pick_device("meta")


# ------------------------------------------------------------------------------------------- strangers' files


class Bomb:
    """What pickle would run as it is read."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_never_run(run, tmp_path):
    trace = tmp_path / "ran"
    (run.output / "last/trainer.pt").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match="resume: .* is damaged"):
        p2_train.main(run)
    torch.save({"epoch": Bomb(trace)}, run.output / "last/trainer.pt")
    with pytest.raises(UserError, match="resume: .* is damaged"):
        p2_train.main(run)
    (run.output / "best" / PROJECTOR).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match="expected a safetensors file"):
        load_captioner(run.output)
    (tmp_path / "net.pth").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match="^encoder"):
        build_encoder(EncoderConfig("timm", "test_vit", str(tmp_path / "net.pth")))
    course = tmp_path / "course"
    course.mkdir()
    (course / "decoder_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    (course / "encoder.json").write_text("{}")
    (course / "vocab.bpe").write_text("")
    with pytest.raises(UserError):
        load_decoder(DecoderConfig(str(course)))
    assert not trace.exists()


def test_a_terminal_escape_in_a_name_is_shown_as_text(tmp_path, capfd):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad\x1b[2J\x07\u202e.png").write_text("no photo")
    batches = PhotoBatches(find_photos(tmp_path), 2)
    journal = Journal(tmp_path / "x.json", {"a": {"decoding": {"max_new_tokens": 3}}})
    for batch in batches:
        journal.append(batch, {"a": [[1]]}, lambda ids: "a dog")
    journal.finish([], batches.bad, {})
    shown = "".join(capfd.readouterr())
    assert "\x07" not in shown and "\x1b[2J" not in shown and "\u202e" not in shown and shown.count(r"\x1b[2J\x07") == 1
    (tmp_path / "notes.\x1b[2J").touch()
    (tmp_path / "captions.json").write_text(json.dumps([{"image": "\x1b[2Ja\ud800.jpg", "caption": None}]))
    find_photos(tmp_path)
    with pytest.raises(UserError):
        read_annotations(tmp_path / "captions.json")
    shown = capfd.readouterr().err
    assert "\x1b" not in shown and shown.count(r"\x1b[2J") == 2  # of a suffix, and of a photo without a caption
    assert one_line("a\n b\t\x1b[31mc\ud800") == r"a b \x1b[31mc\ud800" and len(one_line("x" * 100_000)) == 500


# ------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(kB)`: a folder on a file system of its own of this size. It can be made larger by a second call."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kilobytes: int) -> Path:
        option = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_training_in_one_line_and_it_goes_on_where_space_returns(trained, small_disk):
    weights = sum(map(len, files_of(trained.output / "last").values())) // 1000
    cfg = dataclasses.replace(trained, output=small_disk(weights * 2) / "run", save_steps=1, resume=True)
    with pytest.raises((UserError, OSError), match="No space left|cannot be written"):
        p2_train.main(cfg)  # last/ has room once, and not twice
    before = load_captioner(cfg.output / "last")
    assert before.projector is not None
    small_disk(weights * 20)
    p2_train.main(cfg)
    ours, whole = (load_file(one.output / "last" / LORA_WEIGHTS) for one in (cfg, trained))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("script", [p1_llava_caption, p2_inference, p3_visualize], ids=lambda script: script.__name__)
def test_a_full_disk_loses_no_caption(script, trained, data_root, llava_folder, small_disk, tmp_path):
    shared = {"images": data_root / "images/train", "device": "cpu", "batch_size": 1, "limit": 3}
    source = {"model": str(llava_folder)} if script is p1_llava_caption else {"checkpoint": trained.output}
    shared |= source if script is p1_llava_caption else source | {"features": tmp_path / "none"}
    name = "maps" if script is p3_visualize else "captions.json"
    script.main(script.Config(output=tmp_path / name, **shared))
    whole = files_of(tmp_path / name) if script is p3_visualize else (tmp_path / name).read_bytes()
    output = small_disk(max(8, len(str(whole)) // 4000)) / name
    if script is not p3_visualize:
        (output.parent / "rest").write_bytes(bytes(6_000))  # one block is left for the journal
    with pytest.raises((UserError, OSError), match="No space left|cannot be written"):
        script.main(script.Config(output=output, **shared))
    small_disk(40_000)
    script.main(script.Config(output=output, **shared))
    found = files_of(output) if script is p3_visualize else output.read_bytes()
    assert found == whole


# ------------------------------------------------------------------------------------------- long runs


def test_two_thousand_steps_keep_memory_files_and_threads_flat(trained, tmp_path, monkeypatch, capsys):
    import psutil

    process, seen, step = psutil.Process(), [], p2_train.Trainer.take_step
    steps = int(os.environ.get("STEPS", 200))

    def counted(*args, **parts):
        seen.append((process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()))
        return step(*args, **parts)

    monkeypatch.setattr(p2_train.Trainer, "take_step", counted)
    monkeypatch.setattr(p2_train, "plot_losses", lambda *_: None)
    stage = Stage(epochs=steps / 4, lr=1e-3)
    cfg = dataclasses.replace(trained, output=tmp_path / "run", align=Stage(epochs=0), finetune=stage, val_limit=1)
    p2_train.main(cfg)
    later = np.array(seen[len(seen) // 3 :])
    slopes = np.polyfit(np.arange(len(later)), later, 1)[0] * 1000
    with capsys.disabled():
        said = f"{slopes[0]:.2f} MB, {slopes[1]:.2f} files, {slopes[2]:.2f} threads"
        print(f"\n{len(seen)} steps; slopes in 1,000 steps: {said}")
    assert len(seen) == steps and abs(slopes[1]) < 5 and abs(slopes[2]) < 5
    assert slopes[0] < (5 if steps >= 2000 else 100)


@pytest.mark.parametrize("script", ["p1_llava_caption", "p2_train", "p2_inference", "p3_visualize", "evaluate"])
def test_ctrl_c_while_libraries_load_shows_no_traceback(script, tmp_path):
    stand_in = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "PIL.py").write_text(stand_in)
    # background jobs of a shell start with SIGINT ignored
    allow = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    allow += "sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", allow, f"{script}.py"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")  # which a shell calls 130
