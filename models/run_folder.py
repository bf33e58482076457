"""A run folder of training: what begins it, and what a run needs to go on in it."""

from hashlib import blake2b
from typing import Any

import torch
import yaml

from common.config import UserError, changes, check, flatten, plain, read_yaml
from common.files import JsonLines, remove_folder, remove_parts, restore_folder, written_whole
from models.checkpoint import check_checkpoint
from models.splits import Split
from models.training import STAGES

ONCE = ("overwrite", "resume", "dry_run")  # settings of one call of the script, not of the run
# how the names of settings end that change no result; files may have moved, `inputs_hash` tells if they hold the same
FREE = tuple("device features output data annotations images save_steps tracker gradient_accumulation".split())


def settings_of(cfg: Any) -> dict:
    """What config.yaml holds: all that makes the run what it is, as plain values."""
    return {key: value for key, value in plain(cfg).items() if key not in ONCE}


def inputs_hash(state: dict, *splits: Split | None) -> str:
    """Hash of all that a run reads of its data: names, files and captions of the photos, in their order.

    Raises UserError where it is not that of the `state` of a resumed run.
    """
    read = [(split.features.keys, [(one.stem, one.captions) for one in split.photos]) for split in splits if split]
    found = blake2b(repr(read).encode(), digest_size=10).hexdigest()
    if state.get("inputs", found) != found:
        raise UserError("resume: photos or captions are not those that the run began with; --overwrite begins anew")
    return found


def resumed_state(cfg: Any) -> dict:
    """The trainer's state in last/; empty where a run begins.

    Raises UserError where the settings have changed, or where the state is damaged or gone.
    """
    last = cfg.output / "last"
    restore_folder(last)
    if not cfg.resume:
        return {}
    if not (last / "trainer.pt").exists():
        if (cfg.output / "best").exists():
            raise UserError(f"resume: {last} is gone, {cfg.output} has results of it; --overwrite begins anew")
        return {}
    try:
        old = flatten(settings_of(type(cfg)())) | read_yaml("config", cfg.output / "config.yaml")
        state = dict(torch.load(last / "trainer.pt", map_location="cpu", weights_only=True))
        if state["stage"] not in STAGES or not all(state[key] >= 0 for key in ("epoch", "step", "steps", "logged")):
            raise ValueError("no place in a stage")
    except Exception as error:  # whatever damage a file can have
        said = str(error)[:100]  # torch goes on with advice to trust the file
        raise UserError(f"resume: {last} or config.yaml is damaged ({said}); --overwrite begins anew") from None
    changed = [f"resume: {key} {how}" for key, how in changes(old, settings_of(cfg)).items() if not key.endswith(FREE)]
    check(["resume: a run keeps its settings: give those, or another output"] * bool(changed) + changed)
    check_checkpoint(last)
    return state


def begin_run(cfg: Any, resumed: bool, logged: int) -> None:
    """Write config.yaml and keep the first `logged` rows of the metrics log; a new run starts without folders."""
    for name in () if resumed else ("best", "last", "captioning"):  # captioning: the tracker's
        remove_folder(cfg.output / name)
    remove_parts(cfg.output)
    JsonLines(cfg.output / "metrics.jsonl").keep(logged)  # what a killed run logged after its last save is done again
    with written_whole(cfg.output / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings_of(cfg), sort_keys=False), encoding="utf-8")
