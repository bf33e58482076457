"""A run folder of training: what begins it, and what a run needs to go on in it."""

from typing import Any

import torch
import yaml

from common.config import UserError, changes, check, flatten, plain
from common.files import JsonLines, remove_folder, restore_folder, written_whole
from models.checkpoint import check_checkpoint

ONCE = ("overwrite", "resume", "dry_run")  # settings of one call of the script, not of the run
# settings that change no result
ELSEWHERE = ("device", "features", "output", "data", "images", "val_images", "save_steps", "tracker")


def settings_of(cfg: Any) -> dict:
    """What config.yaml holds: all that makes the run what it is, as plain values."""
    return {key: value for key, value in plain(cfg).items() if key not in ONCE}


def resumed_state(cfg: Any) -> dict | None:
    """The trainer's state in last/; None where a run begins.

    Raises UserError where the settings have changed, or where the state is damaged or gone.
    """
    last, log = cfg.output / "last", cfg.output / "metrics.jsonl"
    restore_folder(last)
    if not cfg.resume:
        return None
    if not (last / "trainer.pt").exists():
        if (cfg.output / "best").exists() or any("val_loss" in row for row in JsonLines(log).rows()):
            raise UserError(f"resume: {last} is gone, {cfg.output} has results of it; --overwrite begins anew")
        return None
    try:
        stored = yaml.safe_load((cfg.output / "config.yaml").read_text(encoding="utf-8"))
        before = flatten(settings_of(type(cfg)())) | flatten(stored)
        state = torch.load(last / "trainer.pt", map_location="cpu", weights_only=True)
        state["rng"], state["epoch"]
    except Exception as error:  # whatever damage a file can have
        raise UserError(f"resume: {last} or config.yaml is damaged ({error}); --overwrite begins anew") from None
    changed = changes(before, settings_of(cfg))
    check([f"resume: {key} {change}" for key, change in changed.items() if key not in ELSEWHERE])
    check_checkpoint(last)
    return state


def begin_run(cfg: Any, resumed: bool, logged: int) -> None:
    """Write config.yaml and keep the first `logged` rows of the metrics log; a new run starts without folders."""
    if not resumed:
        remove_folder(cfg.output / "best")
        remove_folder(cfg.output / "last")
    JsonLines(cfg.output / "metrics.jsonl").keep(logged)  # what a killed run logged after its last save is done again
    with written_whole(cfg.output / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings_of(cfg), sort_keys=False), encoding="utf-8")
