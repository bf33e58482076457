"""A captioner on disk: `captioner.json` (what to build), `projector.safetensors`, `decoder_lora/` in peft's own form.

    python -m models.checkpoint --checkpoint RUN --merge FOLDER    # a plain transformers model, to share

The frozen encoder and decoder are not copied; `captioner.json` names them. The folder's contents alone decide how it is
read, and every tensor must be there, of the right shape, with none left over.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import UserError, check, config_from, run
from common.files import files_hash, folder_problems, folder_written_whole, restore_folder, write_json
from models.captioner import Captioner, CaptionerConfig, build_captioner
from models.decoder import check_decoder, merge_lora
from models.encoder import check_encoder
from models.hub import loading

PROJECTOR, LORA, CONFIG = "projector.safetensors", "decoder_lora", "captioner.json"
LORA_WEIGHTS = f"{LORA}/adapter_model.safetensors"


def absolute(config: CaptionerConfig, beside: Path = Path()) -> CaptionerConfig:
    """The config with local models by absolute paths: a checkpoint is to be read from any working directory.

    They are looked for as they are named, and then relative to the folder `beside`.
    """

    def found(name: str) -> str:
        return next((os.path.abspath(path) for path in (name, beside / name) if os.path.exists(path)), name)

    encoder = replace(config.encoder, weights=found(config.encoder.weights))
    return replace(config, encoder=encoder, decoder=replace(config.decoder, model=found(config.decoder.model)))


def save_captioner(
    captioner: Captioner, folder: Path, dtype: torch.dtype = torch.float32, extra: dict[str, object] | None = None
) -> None:
    """Write what training has learnt to `folder`, which is replaced as a whole once everything is written.

    `extra` are more files {name: object for torch.save}. Raises UserError or OSError where the disk is full.
    """
    (settings,) = captioner.decoder.peft_config.values()
    settings.base_model_name_or_path = captioner.config.decoder.model
    try:
        with folder_written_whole(folder) as part:
            settings.save_pretrained(part / LORA)
            for file, state in learnt(captioner).items():
                save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, part / file)
            write_json(part / CONFIG, asdict(captioner.config))
            for name, value in (extra or {}).items():
                torch.save(value, part / name)
    except (RuntimeError, SafetensorError) as error:  # of a full disk, say; the older folder is kept
        raise UserError(f"output: {folder} cannot be written: {error}") from None


def learnt(captioner: Captioner) -> dict[str, dict[str, Tensor]]:
    """The trained tensors by file and name."""
    from peft import get_peft_model_state_dict

    # the head is adapted, and peft would add the embeddings tied to it: 125 MB for GPT-2
    lora = get_peft_model_state_dict(captioner.decoder, save_embedding_layers=False)
    return {PROJECTOR: captioner.projector.state_dict(), LORA_WEIGHTS: lora}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or `best/` in a run folder, or `last/` where there is no best.

    USER/NAME that is no folder here is fetched from the model hub. Raises UserError.
    """
    from huggingface_hub import snapshot_download

    for folder in (path, path / "best", path / "last"):
        restore_folder(folder)
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists() and len(path.parts) == 2 and not path.is_absolute():
        with loading(f"checkpoint: {path}: no such folder here, and not from a model hub", local=False):
            files = ["*.json", "*projector*", "*lora*"]  # no model's weights
            return find_checkpoint(Path(snapshot_download(path.as_posix(), allow_patterns=files)))
    raise UserError(f"checkpoint: {path}: expected a run folder or a checkpoint folder, found no {CONFIG} in it")


def read_config(folder: Path) -> CaptionerConfig:
    """What the captioner in `folder` is built of. Raises UserError."""
    file = folder / CONFIG
    try:
        return absolute(config_from(CaptionerConfig, json.loads(file.read_text(encoding="utf-8"))), folder)
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{file}: expected the settings of a captioner: {error}") from None


def check_checkpoint(folder: Path) -> CaptionerConfig:
    """Compare the tensors of `folder` with what its `captioner.json` builds, before any weights are loaded.

    Returns the config. Raises UserError for missing files, and for tensors that are missing, unexpected or misshapen.
    """
    config = read_config(folder)
    check(check_encoder(config.encoder) + check_decoder(config.decoder))
    for file, state in learnt(build_captioner(config, load_weights=False)).items():
        expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
        try:
            found = {name: tuple(tensor.shape) for name, tensor in load_file(folder / file).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file}: expected a safetensors file: {error}") from None
        wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        if wrong:
            first = f"{wrong[0]} {expected.get(wrong[0], 'absent')}, got {found.get(wrong[0], 'none')}"
            raise UserError(f"{folder / file}: of another model than {CONFIG}: {len(wrong)} tensors, expected {first}")
    return config


def checkpoint_hash(path: Path) -> str:
    """Hash of all local files that decide what the captioner in `path` writes. Raises UserError."""
    config = read_config(folder := find_checkpoint(path))
    return files_hash(folder, config.encoder.weights, config.decoder.model)


def load_trained(captioner: Captioner, folder: Path) -> None:
    """Copy the trained tensors of `folder`, which `check_checkpoint` has passed, into `captioner`."""
    from peft import set_peft_model_state_dict

    captioner.projector.load_state_dict(load_file(folder / PROJECTOR), strict=True)
    set_peft_model_state_dict(captioner.decoder, load_file(folder / LORA_WEIGHTS))


def load_captioner(path: Path) -> Captioner:
    """The trained captioner in `path` (a run or checkpoint folder), in float32, adapters not yet merged."""
    folder = find_checkpoint(path)
    captioner = build_captioner(check_checkpoint(folder))
    load_trained(captioner, folder)
    return captioner.eval()


@dataclass(frozen=True)
class MergeConfig:
    """A trained captioner without peft: its decoder as a plain transformers model, its projector beside it."""

    checkpoint: Path
    """A run folder of p2_train.py (its best/ is taken), a checkpoint folder, or USER/NAME of the model hub."""
    merge: Path
    """Folder to write: decoder/ with LoRA folded in and the tokenizer, projector.safetensors, captioner.json."""


def main(cfg: MergeConfig) -> None:
    check(folder_problems(cfg.merge, False, "give another name"))
    captioner = load_captioner(cfg.checkpoint)
    lm = merge_lora(captioner.decoder)
    # weights of a GGUF file are plain by now, but transformers saves no model that says it is quantized
    shape = {name: value for name, value in lm.config.to_dict().items() if name != "quantization_config"}
    plain = type(lm)(type(lm.config).from_dict(shape))
    with folder_written_whole(cfg.merge) as part:
        plain.save_pretrained(part / "decoder", state_dict=lm.state_dict())
        captioner.tokenizer.save_pretrained(part / "decoder")
        save_file(captioner.projector.state_dict(), part / PROJECTOR)
        write_json(part / CONFIG, asdict(captioner.config))


if __name__ == "__main__":
    run(main, MergeConfig)
