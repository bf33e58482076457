"""The parts of the models, read off the models themselves: built with their shapes and without their weights.

    python -m report.architecture --model LLAVA --checkpoints RUN --output architecture.json

The JSON lists the models, and for each its parts in the order in which a photo passes them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from common.config import run
from common.files import write_json
from models.captioner import Captioner, build_captioner
from models.checkpoint import check_checkpoint, find_checkpoint
from models.decoder import causal_lm, linear_layers
from models.hub import loading
from models.training import STAGES, parts_of
from models.vlm import PROMPT, VisionLanguageModel


@dataclass(frozen=True)
class Config:
    model: str
    """A vision-language model of transformers: hub id or local folder."""
    checkpoints: list[Path]
    """Runs of p2_train.py."""
    output: Path
    """JSON to write: for each model its name and its parts."""


def shape_of(config: Any) -> str:
    """The size of a network of transformers, by its configuration."""
    names = {"num_hidden_layers": "layers", "hidden_size": "wide", "vocab_size": "tokens known"}
    return ", ".join(f"{getattr(config, key):,} {word}" for key, word in names.items() if hasattr(config, key))


def part_of(name: str, kind: str, shape: str, parameters: Iterable[nn.Parameter], stages: Sequence[str] = ()) -> dict:
    """A part, with the stages that train it."""
    total = sum(parameter.numel() for parameter in parameters)
    return {"part": name, "kind": kind, "shape": shape, "parameters": total, "stages": stages}


def captioner_parts(captioner: Captioner) -> list[dict[str, Any]]:
    """The parts of our captioner, with the stages that train each."""
    encoder, decoder, lora = captioner.encoder, causal_lm(captioner.decoder), captioner.config.lora
    layers = sum("lora_A" in name for name, _ in captioner.decoder.named_parameters())
    patches, text = f"{encoder.tokens} x {encoder.width}", decoder.get_input_embeddings().embedding_dim
    about = {
        "encoder": (type(encoder.net).__name__, f"photo {encoder.transform.size} px -> {patches}"),
        "projector": (captioner.config.projector.kind, f"{patches} -> {encoder.tokens} x {text}"),
        "lora": ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {layers} linear layers"),
        "decoder": (type(decoder).__name__, shape_of(decoder.config)),
    }
    stages = {name: [stage for stage, trained in STAGES.items() if name in trained] for name in about}
    return [part_of(name, *about[name], dict(own).values(), stages[name]) for name, own in parts_of(captioner).items()]


def vlm_parts(model: str) -> list[dict[str, Any]]:
    """The parts of a vision-language model; nothing of it trains. Raises UserError where it cannot be read."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with loading(f"model: could not load {model}", Path(model).is_dir()):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            lm = AutoModelForImageTextToText.from_config(config)
    prompt = VisionLanguageModel(lm, processor, PROMPT).prompt
    ids = processor(images=Image.new("RGB", (336, 336)), text=prompt)["input_ids"][0]
    parts = []
    for name, module in [*lm.model.named_children(), ("lm_head", lm.get_output_embeddings())]:
        linear = [module.get_submodule(one) for one in linear_layers(module)]
        widths = [one.in_features for one in linear[:1]] + [one.out_features for one in linear]
        shape = shape_of(module.config) if hasattr(module, "config") else " -> ".join(map(str, widths))
        shape += f"; {list(ids).count(config.image_token_id)} image tokens of a square photo" * ("projector" in name)
        parts.append(part_of(name, type(module).__name__, shape, module.parameters()))
    return parts


def main(cfg: Config) -> None:
    models = [{"name": cfg.model, "parts": vlm_parts(cfg.model)}]
    for path in cfg.checkpoints:
        captioner = build_captioner(check_checkpoint(find_checkpoint(path)), load_weights=False)
        models.append({"name": str(path), "parts": captioner_parts(captioner)})
    write_json(cfg.output, models)
    print(cfg.output)


if __name__ == "__main__":
    run(main, Config)
