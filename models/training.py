"""What trains, with which optimizer and on which schedule: the two stages are data, not code."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, LRScheduler

from models.captioner import Captioner
from models.decoder import causal_lm, fuse_lora

STAGES = {"align": ("projector",), "finetune": ("projector", "lora")}  # what each stage trains


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    epochs: NonNegativeFloat = 2
    """Passes over all (photo, caption) pairs; the last may be a part of one; 0 skips the stage."""
    lr: PositiveFloat = 1e-3
    """Learning rate at its highest."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, of adamw only."""
    schedule: Literal["constant", "cosine", "warm_restarts"] = "constant"
    """How the rate falls, in optimizer steps: not, once to min_lr, or to min_lr again and again (arXiv 1608.03983)."""
    min_lr: NonNegativeFloat = 0.0
    """Where cosine and warm_restarts end."""
    warmup: NonNegativeFloat = 0.0
    """Share of the stage's steps in which the rate rises from 0 (constant and cosine)."""
    restart_epochs: PositiveFloat = 1.0
    """Length of the first warm-restart period, in epochs."""
    restart_mult: PositiveInt = 2
    """Each warm-restart period is so many times as long as the one before."""


def parts_of(captioner: Captioner) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """All parameters by part: encoder, projector, lora, decoder."""
    parts: dict[str, list] = {"encoder": [], "projector": [], "lora": [], "decoder": []}
    for name, parameter in captioner.named_parameters():
        part = name.partition(".")[0]
        parts["lora" if part == "decoder" and "lora_" in name else part].append((name, parameter))
    return parts


def set_trainable(captioner: Captioner, stage: str, lr: float) -> list[torch.nn.Parameter]:
    """Thaw the parts that `stage` trains, freeze the rest, print the table and return what trains.

    The one place that decides what trains. Raises RuntimeError where a part that should train is empty.
    """
    trainable = []
    adapt = "lora" in STAGES[stage]  # until it trains LoRA changes nothing, so its products are left out
    captioner.decoder.enable_adapter_layers() if adapt else captioner.decoder.disable_adapter_layers()
    print(f"{stage:10} {'parameters':>15} {'trainable':>13} {'lr':>8}")
    for part, parameters in parts_of(captioner).items():
        train = part in STAGES[stage]
        if train and not parameters:
            raise RuntimeError(f"{stage} should train {part}, which has no parameters")
        for _, parameter in parameters:
            parameter.requires_grad_(train)
        trainable += [parameter for _, parameter in parameters] if train else []
        total = sum(parameter.numel() for _, parameter in parameters)
        print(f"  {part:8} {total:>15,} {total if train else 0:>13,} {f'{lr:g}' if train else '-':>8}")
    print(f"  {'all':8} {sum(p.numel() for p in captioner.parameters()):>15,} {sum(p.numel() for p in trainable):>13,}")
    return trainable


def prepare_training(captioner: Captioner, dtype: torch.dtype, device: torch.device) -> str:
    """Make a training step cheap: frozen weights in `dtype`, fused LoRA, the attention that is fastest on `device`.

    Returns transformers' name of that attention.
    """
    for _, parameter in parts_of(captioner)["decoder"]:  # in 16 bits once, not cast anew at each step
        parameter.data = parameter.data.to(dtype)
    fuse_lora(captioner.decoder)
    # on a CPU the backward pass of sdpa under a mask is several times slower than attention written out
    implementation = "eager" if device.type == "cpu" else "sdpa"
    causal_lm(captioner.decoder).set_attn_implementation(implementation)
    return implementation


def make_optimizer(parameters: list[torch.nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=stage.weight_decay)
    return torch.optim.Adam(parameters, lr=stage.lr)


def make_schedule(optimizer: torch.optim.Optimizer, stage: Stage, steps_per_epoch: int) -> LRScheduler:
    """The stage's schedule, one call of `step()` an optimizer step."""
    if stage.schedule == "warm_restarts":
        first = max(1, round(stage.restart_epochs * steps_per_epoch))
        return CosineAnnealingWarmRestarts(optimizer, T_0=first, T_mult=stage.restart_mult, eta_min=stage.min_lr)
    total = round(stage.epochs * steps_per_epoch)
    warmup = math.ceil(stage.warmup * total)
    lowest = stage.min_lr / stage.lr if stage.schedule == "cosine" else 1.0

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, share)


def check_stage(name: str, stage: Stage) -> list[str]:
    """What is wrong with a stage's settings taken together."""
    problems = [
        f"{name}.{key}: expected a finite number, got {getattr(stage, key)}"
        for key in ("epochs", "lr")
        if not math.isfinite(getattr(stage, key))
    ]
    if stage.weight_decay and stage.optimizer != "adamw":
        problems.append(f"{name}.weight_decay: expected 0 with optimizer {stage.optimizer}, got {stage.weight_decay}")
    if stage.warmup and stage.schedule == "warm_restarts":
        problems.append(f"{name}.warmup: expected 0 with warm_restarts, got {stage.warmup}")
    if stage.warmup >= 1:
        problems.append(f"{name}.warmup: expected a share of the steps below 1, got {stage.warmup}")
    return problems
