"""SIGKILL at random moments, half of them inside a save: nothing is lost, and all results are those of an unbroken run.

`make torture` kills 50 times and writes runs/torture.json; the test suite kills 10 times.
"""

import dataclasses
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import models.checkpoint
import p1_llava_caption
import p2_inference
import p2_train
import p3_visualize
from common.files import JsonLines
from models.decoder import LoraConfig
from models.training import Stage

WALL_CLOCK = {"seconds", "tokens_a_second", "memory_gb"}
KILLS = int(os.environ.get("KILLS", "10"))
SAVES = [(os, "replace"), (os, "rename"), (shutil, "rmtree"), (torch, "save"), (models.checkpoint, "save_file")]
SAVES.append((JsonLines, "append"))


def die_inside_save(fatal: int, counted: Path) -> None:
    """Let this process kill itself at one of its saves: before it where `fatal` is even, in the middle where it is odd.

    With `fatal` -1 it lives, and the file `counted` grows by a byte at each save.
    """
    seen = iter(range(0, 10**6, 2))

    def wrap(name: str, save):
        def wrapped(*args, **kwargs):
            number = next(seen)
            if fatal == -1:
                with counted.open("a") as file:
                    file.write(".")
            if fatal == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if fatal == number + 1 and name in ("save", "save_file"):  # half of the file is on the disk
                result = save(*args, **kwargs)
                os.truncate(args[1], Path(args[1]).stat().st_size // 2)
            elif fatal == number + 1 and name == "append":
                with args[0].path.open("ab") as file:
                    file.write(json.dumps(args[1]).encode()[:5])
            else:
                result = save(*args, **kwargs)
            if fatal == number + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for owner, name in SAVES:
        setattr(owner, name, wrap(name, getattr(owner, name)))


def run(script, cfg, fatal: int | None = None, delay: float | None = None, counted: Path = Path()) -> int:
    """Run a script in a process of its own, which is killed in a save or after `delay` seconds; its exit code."""
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)  # threads do not survive a fork
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 1
        try:
            if fatal is not None:
                die_inside_save(fatal, counted)
            script.main(cfg)
            code = 0
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results_of(folder: Path) -> dict:
    """All that a finished script has left in its folder, without times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            rows = JsonLines(path).rows()
            found[name] = [{key: row[key] for key in row.keys() - WALL_CLOCK} for row in rows]
        elif path.suffix == ".pt":
            found[name] = str(torch.load(path, weights_only=True))
        elif path.name.endswith(".meta.json"):
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        else:  # loss.png and config.yaml name the folder or the day
            same = path.suffix in (".safetensors", ".json", ".html", ".png") and path.name != "loss.png"
            found[name] = path.read_bytes() if same else b""
    return found


@pytest.fixture
def jobs(data_root, captioner_config, llava_folder, make_captioner, tmp_path) -> dict:
    """Script and settings by name."""
    models.checkpoint.save_captioner(make_captioner("gpt2"), tmp_path / "captioner")
    parts = captioner_config("gpt2", lora=LoraConfig(rank=4, alpha=8, dropout=0.1))
    train = p2_train.Config(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}, data=data_root, ema=0.9,
        features=tmp_path / "features", device="cpu", batch_size=6, captions_per_row=3, save_steps=1,
        align=Stage(epochs=1, lr=1e-2), finetune=Stage(epochs=2, lr=3e-3), output=tmp_path,
    )  # fmt: skip
    photos = {"images": data_root / "images" / "train", "device": "cpu", "batch_size": 1, "output": tmp_path}
    ours = p2_inference.Config(checkpoint=tmp_path / "captioner", features=tmp_path / "none", **photos)
    maps = p3_visualize.Config(checkpoint=tmp_path / "captioner", features=tmp_path / "none", **photos)
    llava = p1_llava_caption.Config(model=str(llava_folder), decoding=["best"], **photos)
    others = {"captions": ("p2_inference", ours), "llava": ("p1_llava_caption", llava), "maps": ("p3_visualize", maps)}
    return {"training": ("p2_train", train)} | others


def into(folder: Path, cfg):
    """The settings of a script that writes into `folder`, and goes on where that holds a part of its work."""
    if isinstance(cfg, p2_train.Config):
        return dataclasses.replace(cfg, output=folder, resume=True)
    return dataclasses.replace(cfg, output=folder if isinstance(cfg, p3_visualize.Config) else folder / "captions.json")


def finished(folder: Path) -> bool:
    """Whether a script other than training has done its work there: it would refuse to begin anew."""
    done = any((folder / name).exists() for name in ("captions.json", "index.html"))
    return done and not any((folder / name).exists() for name in ("captions.journal.jsonl", "unfinished.jsonl"))


def torture(jobs: dict, root: Path) -> list[dict]:
    """Kill each job again and again; what came of it, a row a job."""
    draw, table = random.Random(0), []
    for name, (script, cfg) in jobs.items():
        script = importlib.import_module(script)
        whole, counted, start = root / f"{name}_whole", root / f"{name}_saves", time.monotonic()
        assert run(script, into(whole, cfg), fatal=-1, counted=counted) == 0
        seconds, saves, expected = time.monotonic() - start, counted.stat().st_size, results_of(whole)
        row = {"job": name, "saves": saves, "kills": 0, "in_saves": 0, "lost": 0, "differing": 0}
        table.append(row)
        attempts = 0
        while row["kills"] < (KILLS // 2 if name == "training" else -(-KILLS // 6)):
            attempts += 1
            folder = root / f"{name}_{attempts}"
            for _ in range(draw.randint(1, 3)):
                inside = row["in_saves"] <= row["kills"] // 2
                how = {"fatal": draw.randrange(2 * saves)} if inside else {"delay": draw.uniform(0.1, seconds)}
                killed = not finished(folder) and run(script, into(folder, cfg), **how) == -signal.SIGKILL
                row["kills"] += killed
                row["in_saves"] += killed and inside
            row["lost"] += not finished(folder) and run(script, into(folder, cfg)) != 0
            found = results_of(folder)
            row["lost"] += len(expected.keys() - found.keys())
            row["differing"] += sum(found[key] != expected.get(key) for key in found)
    return table


def test_kills_lose_nothing_and_change_nothing(jobs, tmp_path):
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    # in a process of its own that computes in one thread: threads do not survive a fork
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads(done.stdout.splitlines()[-1])
    total = {key: sum(row[key] for row in table) for key in ("kills", "in_saves", "lost", "differing")}
    if "KILLS" in os.environ:
        Path("runs").mkdir(exist_ok=True)
        Path("runs/torture.json").write_text(json.dumps(total | {"jobs": table}, indent=1))
        print(json.dumps(table, indent=1))
    assert total["lost"] == total["differing"] == 0 and total["kills"] >= KILLS, table


if __name__ == "__main__":
    there = Path(sys.argv[1])
    print(json.dumps(torture(pickle.loads((there / "jobs").read_bytes()), there)))
