"""A captioner on disk: `captioner.json` (what to build), `projector.safetensors`, `decoder_lora/` in peft's own form.

The frozen encoder and decoder are not copied; `captioner.json` names them. The folder's contents alone decide how it
is read, and every tensor must be there, of the right shape, with none left over.
"""

import json
import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import UserError, check, config_from
from common.files import write_json
from models.captioner import Captioner, CaptionerConfig, build_captioner
from models.decoder import check_decoder
from models.encoder import check_encoder

PROJECTOR, LORA, CONFIG = "projector.safetensors", "decoder_lora", "captioner.json"
LORA_WEIGHTS = f"{LORA}/adapter_model.safetensors"


def save_captioner(
    captioner: Captioner, folder: Path, dtype: torch.dtype = torch.float32, extra: dict[str, object] | None = None
) -> None:
    """Write what training has learnt to `folder`, which is replaced as a whole once everything is written.

    `extra` are more files {name: object for torch.save}.
    """
    part = _part(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in captioner.projector.state_dict().items()},
        part / PROJECTOR,
    )
    (settings,) = captioner.decoder.peft_config.values()
    settings.base_model_name_or_path = captioner.config.decoder.model
    settings.save_pretrained(part / LORA)
    lora = _lora_state(captioner.decoder)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in lora.items()}, part / LORA_WEIGHTS)
    write_json(part / CONFIG, asdict(captioner.config))
    for name, value in (extra or {}).items():
        torch.save(value, part / name)
    replace_folder(part, folder)


def remove_checkpoint(folder: Path) -> None:
    """Delete the checkpoint `folder` and what a killed run may have left of it."""
    for path in (folder, _old(folder), _part(folder)):
        shutil.rmtree(path, ignore_errors=True)


def _part(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _old(folder: Path) -> Path:
    """Where `folder` stands while a new one takes its place; a killed run may leave it there."""
    return folder.with_name(f".{folder.name}.old")


def replace_folder(part: Path, folder: Path) -> None:
    """Move `part` to where `folder` is, keeping the old one until the new one is in place."""
    old = _old(folder)
    restore_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was killed after it had moved the old folder away."""
    if not folder.exists():
        with suppress(FileNotFoundError):  # nothing to undo, or another process was faster
            os.rename(_old(folder), folder)


def _lora_state(decoder) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the head is adapted, and peft would add the embeddings tied to it: 125 MB for GPT-2
        return get_peft_model_state_dict(decoder, save_embedding_layers=False)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or `best/` in a run folder, or `last/` where there is no best."""
    for folder in (path, path / "best", _old(path / "best"), path / "last", _old(path / "last")):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"checkpoint: {path}: expected a run folder or a checkpoint folder, found no {CONFIG} in it")


def read_config(folder: Path) -> CaptionerConfig:
    """`captioner.json` of a checkpoint folder."""
    file = folder / CONFIG
    try:
        return config_from(CaptionerConfig, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, UserError) as error:
        raise UserError(f"{file}: expected the settings of a captioner: {error}") from None


def check_checkpoint(folder: Path) -> CaptionerConfig:
    """Compare the tensors of `folder` with what its `captioner.json` builds, before any weights are loaded.

    Returns the config. Raises UserError for missing files, and for tensors that are missing, unexpected or misshapen.
    """
    config = read_config(folder)
    missing = [name for name in (PROJECTOR, LORA_WEIGHTS) if not (folder / name).is_file()]
    check([f"checkpoint: {folder}: expected {name} in it" for name in missing])
    check(check_encoder(config.encoder) + check_decoder(config.decoder))
    empty = build_captioner(config, load_weights=False)
    for file, state in ((PROJECTOR, empty.projector.state_dict()), (LORA_WEIGHTS, _lora_state(empty.decoder))):
        expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
        try:
            with safe_open(folder / file, framework="pt") as stored:
                found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
        except SafetensorError as error:
            raise UserError(f"{folder / file}: expected a safetensors file: {error}") from None
        wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        if wrong:
            first = f"{wrong[0]} {expected.get(wrong[0], 'absent')}, got {found.get(wrong[0], 'none')}"
            raise UserError(f"{folder / file}: of another model than {CONFIG}: {len(wrong)} tensors, expected {first}")
    return config


def load_trained(captioner: Captioner, folder: Path) -> None:
    """Copy the trained tensors of `folder` into `captioner`, strictly."""
    from peft import set_peft_model_state_dict

    captioner.projector.load_state_dict(load_file(folder / PROJECTOR), strict=True)
    state = load_file(folder / LORA_WEIGHTS)
    result = set_peft_model_state_dict(captioner.decoder, state)
    lost = [name for name in result.missing_keys if "lora_" in name]
    if lost or result.unexpected_keys:
        raise UserError(f"{folder / LORA_WEIGHTS}: of another model: {(lost + list(result.unexpected_keys))[0]}")


def load_captioner(path: Path) -> Captioner:
    """The trained captioner in `path` (a run or checkpoint folder), in float32, adapters not yet merged."""
    folder = find_checkpoint(path)
    captioner = build_captioner(check_checkpoint(folder))
    load_trained(captioner, folder)
    return captioner.eval()
