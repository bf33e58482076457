"""What trains, with which optimizer and on which schedule: the two stages are data, not code."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt, restricted_number_type
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, LRScheduler

from models.captioner import Captioner
from models.decoder import causal_lm, fuse_lora

FiniteNonNegativeFloat = restricted_number_type("FiniteNonNegativeFloat", float, [(">=", 0), ("<", math.inf)])
STAGES = {"align": ("projector",), "finetune": ("projector", "lora")}  # what each stage trains


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    epochs: FiniteNonNegativeFloat = 2
    """Passes over all (photo, caption) pairs; the last may be a part of one; 0 skips the stage."""
    lr: PositiveFloat = 1e-3
    """Learning rate at its highest."""
    projector_lr: PositiveFloat | None = None
    """The projector's own learning rate, if it should differ; the schedule is the same and ends at min_lr too."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay; at 0 AdamW is Adam."""
    schedule: Literal["constant", "cosine", "warm_restarts"] = "constant"
    """constant; cosine: falls once to min_lr; warm_restarts: falls to min_lr again and again (arXiv 1608.03983)."""
    min_lr: NonNegativeFloat = 0.0
    """Where cosine and warm_restarts end."""
    warmup: ClosedUnitInterval = 0.0
    """Share of the stage's steps in which the rate rises from 0 (constant and cosine)."""
    restart_epochs: PositiveFloat = 1.0
    """Length of the first warm-restart period, in epochs."""
    restart_mult: PositiveInt = 2
    """Each warm-restart period is so many times as long as the one before."""


def parts_of(captioner: Captioner) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """All parameters by part: encoder, projector, lora, decoder."""
    parts: dict[str, list] = {"encoder": [], "projector": [], "lora": [], "decoder": []}
    for name, parameter in captioner.named_parameters():
        parts["lora" if "lora_" in name else name.partition(".")[0]].append((name, parameter))
    return parts


def set_trainable(captioner: Captioner, name: str, stage: Stage) -> list[dict]:
    """Thaw the parts that the stage `name` trains, freeze the rest, print the table and return what trains.

    It is returned as the optimizer takes it: a group {"params": ..., "lr": ...} for each part. The one place that
    decides what trains.
    """
    groups = []
    adapt = "lora" in STAGES[name]  # until it trains LoRA changes nothing, so its products are left out
    captioner.decoder.enable_adapter_layers() if adapt else captioner.decoder.disable_adapter_layers()
    print(f"{name:10} {'parameters':>15} {'trainable':>13} {'lr':>8}")
    for part, named in parts_of(captioner).items():
        parameters = [parameter for _, parameter in named]
        train = part in STAGES[name]
        lr = stage.projector_lr if part == "projector" and stage.projector_lr else stage.lr  # at its highest
        for parameter in parameters:
            parameter.requires_grad_(train)
        if train:
            groups.append({"params": parameters, "lr": lr})
        total = sum(parameter.numel() for parameter in parameters)
        print(f"  {part:8} {total:>15,} {total if train else 0:>13,} {f'{lr:g}' if train else '-':>8}")
    parameters = list(captioner.parameters())
    every, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    print(f"  {'all':8} {every:>15,} {trained:>13,}")
    return groups


def prepare_training(captioner: Captioner, dtype: torch.dtype, device: torch.device) -> None:
    """Make a training step cheap: frozen weights in `dtype`, fused LoRA, the attention that is fastest on `device`."""
    for _, parameter in parts_of(captioner)["decoder"]:  # in 16 bits once, not cast anew at each step
        parameter.data = parameter.data.to(dtype)
    fuse_lora(captioner.decoder)
    # on a CPU the backward pass of sdpa under a mask is several times slower than attention written out
    causal_lm(captioner.decoder).set_attn_implementation("eager" if device.type == "cpu" else "sdpa")


class Average(nn.Module):
    """An exponential average of what trains, over the steps of one stage; with `decay` 0 it is what trains itself.

    The average starts from weights that have learnt nothing. So it forgets faster at first: after n steps it keeps at
    most (1 + n) / (10 + n) of itself.
    """

    def __init__(self, groups: list[dict], decay: float):
        super().__init__()
        self.trained, self.decay = [parameter for group in groups for parameter in group["params"]], decay
        self.values = nn.ParameterList([parameter.detach().clone() for parameter in self.trained] if decay else [])
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def update(self) -> None:
        """Take in what the optimizer has just made."""
        self.steps += 1
        if self.decay:
            keep = min(self.decay, (1 + self.steps.item()) / (10 + self.steps.item()))
            torch._foreach_lerp_(list(self.values), self.trained, 1 - keep)

    def swap(self) -> None:
        """Put the average into the model in place of what trains; a second call puts that back."""
        for parameter, value in zip(self.trained, self.values):
            parameter.data, value.data = value.data, parameter.data


def make_schedule(optimizer: torch.optim.Optimizer, stage: Stage, steps_per_epoch: int) -> LRScheduler:
    """The stage's schedule, one call of `step()` an optimizer step."""
    if stage.schedule == "warm_restarts":
        first = max(1, round(stage.restart_epochs * steps_per_epoch))
        return CosineAnnealingWarmRestarts(optimizer, T_0=first, T_mult=stage.restart_mult, eta_min=stage.min_lr)
    total = round(stage.epochs * steps_per_epoch)
    warmup = math.ceil(stage.warmup * total)

    def share(step: int, lowest: float) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    lowest = [stage.min_lr / group["lr"] if stage.schedule == "cosine" else 1.0 for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(share, lowest=one) for one in lowest])


def check_stage(name: str, stage: Stage) -> list[str]:
    """What is wrong with a stage's settings taken together."""
    if stage.warmup and stage.schedule == "warm_restarts":
        return [f"{name}.warmup: expected 0 with warm_restarts, got {stage.warmup}"]
    return []
