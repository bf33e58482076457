"""Several processes against one, on the CPU: training, resuming, captioning, and what a killed process leaves."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

import p1_llava_caption
import p2_inference
import p2_train
from common.config import run
from common.files import JsonLines
from data.journal import Journal
from models.checkpoint import save_captioner
from models.run_folder import settings_of
from models.training import Stage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
LOST = "p2_train.py: another process has ended or does not answer, so this one ends; the run can go on"


def fault(owner, name: str, call: int, number: signal.Signals) -> None:
    """Let this process get the signal `number` when it calls a method of the class `owner` for the `call`th time."""
    method, calls = getattr(owner, name), Counter()

    def wrapped(*args, **kwargs):
        calls[name] += 1
        if calls[name] == call:
            os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    setattr(owner, name, wrapped)


def play(script: str, settings: Path, rank: int, count: int, port: int, faults: dict[int, tuple]) -> None:
    """A script as one of several processes, with what launchers put into the environment."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"})
    sys.argv = [f"{script}.py", "--config", str(settings)]
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{settings}.{rank}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    p2_train.LOG_STEPS = 1
    if rank in faults:
        fault(*faults[rank])
    module = importlib.import_module(script)
    run(module.main, module.Config)


@pytest.fixture(scope="module")
def together():
    """`together(script, cfg, folder, count, faults)`: exit codes and stderr of `count` processes.

    They are forked from a server that has imported the scripts and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["p1_llava_caption", "p2_inference", "p2_train"])
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])

    def start(script: str, cfg, folder: Path, count: int = 2, faults: dict | None = None) -> tuple[list, list]:
        settings = folder / f"{script}.yaml"
        given = {key: value for key, value in settings_of(cfg).items() if value is not None}
        settings.write_text(yaml.safe_dump(given | {"resume": True} if script == "p2_train" else given))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            context.Process(target=play, args=(script, settings, rank, count, port, faults or {}))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        if faults and script != "p2_train":  # as the launcher does, which ends the rest
            for rank in faults:
                processes[rank].join(60)
            for process in processes:
                process.terminate()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes, [Path(f"{settings}.{rank}.err").read_text() for rank in range(count)]

    return start


def losses(folder: Path) -> list[tuple]:
    return [
        (row["stage"], row["epoch"], row.get("step"), row.get("loss", row.get("val_loss")))
        for row in JsonLines(folder / "metrics.jsonl").rows()
    ]


def test_two_processes_train_as_one_and_a_run_changes_their_number(
    together, data_root, captioner_config, tmp_path, monkeypatch
):
    """One run: two processes until a signal, one until a kill, two until one of them dies, and two to the end."""
    parts = captioner_config()
    cfg = p2_train.Config(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}, data=data_root,
        features=tmp_path / "features", device="cpu", batch_size=6, save_steps=1, output=tmp_path / "one",
        align=Stage(epochs=1, lr=1e-2), finetune=Stage(epochs=2, lr=3e-3, schedule="warm_restarts", min_lr=1e-4),
    )  # fmt: skip
    monkeypatch.setattr(p2_train, "LOG_STEPS", 1)
    p2_train.main(cfg)
    two = dataclasses.replace(cfg, output=tmp_path / "two", features=tmp_path / "shared")

    codes, errors = together("p2_train", two, tmp_path, faults={1: (p2_train.Trainer, "take_step", 2, signal.SIGTERM)})
    assert codes == [143, 143] and "stopped after step 2 of align, epoch 1" in errors[0] and errors[1] == ""
    assert len(list((tmp_path / "shared").glob("*/*/*.bin"))) == 12

    killed = {0: (p2_train.Trainer, "take_step", 5, signal.SIGKILL)}  # in the middle of the next epoch
    assert together("p2_train", two, tmp_path, 1, killed)[0] == [-signal.SIGKILL]

    codes, errors = together("p2_train", two, tmp_path, faults={1: (p2_train.Trainer, "take_step", 3, signal.SIGKILL)})
    assert codes == [1, -signal.SIGKILL]
    assert errors[0].splitlines()[-1] == LOST
    assert together("p2_train", two, tmp_path)[0] == [0, 0]

    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [row[:3] for row in ours] == [row[:3] for row in theirs] and len(ours) == 15
    assert [row[3] for row in ours] == pytest.approx([row[3] for row in theirs], abs=1e-4)
    for run_folder in ("one", "two"):
        images = data_root / "images" / "val"
        output = tmp_path / f"{run_folder}.json"
        p2_inference.main(p2_inference.Config(tmp_path / run_folder, images, output, device="cpu"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.fixture
def captioning(make_captioner, llava_folder, data_root, tmp_path) -> dict:
    """Settings of both captioning scripts, for 24 photos, one of which cannot be decoded."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(24):
        (folder / f"p{number:02}.png").symlink_to(data_root / "images" / "train" / f"train{number % 8}.png")
    (folder / "p03.png").unlink()
    (folder / "p03.png").write_text("no photo")
    save_captioner(make_captioner("gpt2"), tmp_path / "captioner")
    shared = {"images": [folder], "device": "cpu", "batch_size": 1, "output": tmp_path / "one.json"}
    return {
        "p2_inference": p2_inference.Config(checkpoint=tmp_path / "captioner", **shared),
        "p1_llava_caption": p1_llava_caption.Config(model=str(llava_folder), decoding=["best", "diverse"], **shared),
    }


@pytest.mark.parametrize("script, kills", [("p2_inference", 5), ("p1_llava_caption", 1)])
def test_killed_captioning_processes_lose_nothing_and_do_nothing_twice(together, captioning, tmp_path, script, kills):
    cfg, draw = captioning[script], random.Random(0)
    importlib.import_module(script).main(cfg)
    cfg = dataclasses.replace(cfg, output=tmp_path / "two.json")
    for both in (False, True, True, True, False)[:kills]:
        rank, call = draw.randrange(2), draw.randrange(1, 3)
        doomed = (0, 1) if both else (rank,)
        codes, _ = together(
            script, cfg, tmp_path, 2 + both, {one: (Journal, "append", call, signal.SIGKILL) for one in doomed}
        )
        assert all(codes[one] == -signal.SIGKILL for one in doomed) and not (tmp_path / "two.json").exists()
        done = Counter(row[0] for path in tmp_path.glob("two.journal*.jsonl") for row in JsonLines(path).rows()[1:])
        assert set(done.values()) <= {1} and len(done) < 23
    codes, errors = together(script, cfg, tmp_path)
    assert codes == [0, 0] and errors[1] == "" and not list(tmp_path.glob("two.journal*"))
    for file in tmp_path.glob("one*.json"):
        other = file.with_name(file.name.replace("one", "two"))
        if ".meta." not in file.name:
            assert file.read_bytes() == other.read_bytes() and len(json.loads(file.read_text())) == 23
        else:
            ours, theirs = (json.loads(path.read_text()) | {"seconds": 0} for path in (file, other))
            assert ours == theirs and ours["skipped"].keys() == {"p03.png"}


def test_a_mistake_is_said_once_and_the_launcher_starts_both(captioning, tmp_path):
    """torchrun, which `accelerate launch` uses for GPUs, starts the script itself."""
    cfg = captioning["p2_inference"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "p2_inference.py"]
    command += ["--checkpoint", cfg.checkpoint, "--images", *cfg.images, "--output", tmp_path / "two.json"]
    beams = "--overwrite --decoding.num_beams 0".split()
    for flags, code, said in (([], 0, "23 captions in"), (beams, 1, "error: decoding.num_beams")):
        done = subprocess.run([*map(str, command), "--device", "cpu", *flags], capture_output=True, text=True)
        assert done.returncode == code
        assert (done.stdout + done.stderr).count(said) == 1
