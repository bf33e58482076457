"""P2, training: photos + captions -> a run: a projector and LoRA, trained in two stages on frozen models.

    python p2_train.py --config configs/p2_lora_r32.yaml --data DATA --output runs/p2_r32   # the published setting
    python p2_train.py --config configs/p2_packed.yaml --data DATA --output runs/p2_packed  # what we recommend
    python p2_train.py --config configs/p2_lora_r32.yaml --dry_run                          # parts and parameters
    python p2_train.py --config configs/shapes.yaml --data runs/demo/shapes --output runs/demo/p2  # minutes on a CPU

Stage `align` trains the projector alone, stage `finetune` the projector and LoRA. A run folder holds config.yaml,
metrics.jsonl, loss.png, best/ (lowest validation loss) and last/ (where `--resume` goes on, also inside an epoch).
SIGTERM or Ctrl-C lets the step end, saves and stops; a second one stops at once. Several processes (docs/scale.md)
train as one does, and stop together within 20 steps.
"""

import common  # noqa: F401  Ctrl-C ends what is loaded below without a traceback

# isort: split
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from tqdm import tqdm

from common.config import CommonSettings, NothingDone, UserError, check, flatten, run, stop_signals
from common.device import Precision, memory_used, pick_device, torch_dtype
from common.files import FEATURES, JsonLines, folder_problems, lock
from data.annotations import read_splits
from data.batches import Row, batch_tokens, epoch_batches, parts_of_process
from data.prefetch import prefetch
from metrics.cider import agreement
from models import training
from models.captioner import Captioner, CaptionerConfig, build_captioner
from models.checkpoint import absolute, find_checkpoint, load_trained, save_captioner
from models.decoder import check_decoder
from models.encoder import check_encoder
from models.run_folder import begin_run, inputs_hash, resumed_state, settings_of
from models.splits import Split, prepare_split, weigh_by_agreement
from pages.figures import plot_losses

LOG_STEPS = 20  # a row of metrics.jsonl after so many steps


@dataclass(frozen=True)
class Config(CommonSettings, CaptionerConfig):
    """Settings: the captioner's encoder, projector, decoder and lora, and these; the defaults are the published run."""

    data: Path | None = None
    """Folder with train.json, val.json and images/; or name the four below."""
    annotations: Path | None = None
    """Training captions, in a form that data/forms.py reads: COCO, Karpathy, Flickr8k, LLaVA, tables, JSON."""
    images: Path | None = None
    """Folder of the training photos."""
    val_annotations: Path | None = None
    """Validation captions, in the same forms. A file that holds several splits may be named for both."""
    val_images: Path | None = None
    """Folder of the validation photos."""
    output: Path | None = None
    """Run folder to write."""
    resume: bool = False
    """Go on with the run in `output` from where it was saved last."""
    dry_run: bool = False
    """Print the parts and their trainable parameters, and stop: no data, no network, no weights."""

    align: training.Stage = training.Stage()
    """Stage 1: the projector alone."""
    finetune: training.Stage = training.Stage(epochs=3, schedule="warm_restarts", min_lr=1e-4)
    """Stage 2: projector and LoRA."""

    batch_size: PositiveInt = 12
    """Captions of an optimizer step, over all processes and all parts together."""
    captions_per_row: PositiveInt = 1
    """How many captions of one photo share its image prefix in one row. The gradients are the same, with less work."""
    bucket: bool = False
    """Put rows of similar length into one batch, which saves padding."""
    gradient_accumulation: PositiveInt = 1
    """Parts that each process takes of a batch, one after another: less memory, the same training."""
    consensus: NonNegativeFloat = 0.0
    """Weight of a caption in training: its agreement (CIDEr-D) with its photo's others, to this power; 0: all 1."""
    ema: ClosedUnitInterval = 0.0
    """Decay of an exponential average of what trains, measured and kept in best/; 0: the weights themselves."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Clip the gradient to this norm; 0: no clipping."""
    precision: Precision = "float32"
    """bf16 and fp16 hold the frozen weights in 16 bits and compute in them; what trains stays in float32."""
    save_precision: Precision = "float32"
    """Precision of best/; last/ is always float32."""
    save_steps: PositiveInt = 200
    """Save the run's state in last/ after so many optimizer steps, and at the end of each epoch."""
    skip_bad_photos: bool = False
    """Go on without photos that are missing or cannot be decoded, and without captions that the decoder has no
    positions for, instead of ending with an error."""
    features: Path = FEATURES
    """Cache of encoded photos, shared by all runs."""
    val_limit: PositiveInt | None = None
    """Only the first so many validation photos."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """Send what metrics.jsonl gets also to this tracker; TensorBoard's files go to the run folder."""


# ------------------------------------------------------------------------------------------- before training


def check_settings(cfg: Config) -> None:
    """Raise a UserError for what is wrong with the settings alone."""
    problems = check_encoder(cfg.encoder) + check_decoder(cfg.decoder)
    problems += training.check_stage("align", cfg.align) + training.check_stage("finetune", cfg.finetune)
    if not cfg.align.epochs and not cfg.finetune.epochs:
        problems.append("finetune.epochs: expected at least one stage that trains, got 0 epochs in all")
    if cfg.batch_size % cfg.captions_per_row:
        expected = f"a multiple of captions_per_row {cfg.captions_per_row}"
        problems.append(f"batch_size: expected {expected}, got {cfg.batch_size}")
    if cfg.tracker and cfg.tracker not in map(str, get_available_trackers()):
        problems.append(f"tracker: {cfg.tracker} is not installed; pip install {cfg.tracker}")
    if not cfg.dry_run:
        if (cfg.data is None) == (cfg.annotations is None) or (cfg.data and cfg.val_annotations):
            problems.append("data: expected either data or annotations, got " + ("both" if cfg.data else "neither"))
        hint = "--resume goes on with it, --overwrite replaces it"
        problems += folder_problems(cfg.output, cfg.overwrite or cfg.resume, hint, marker="config.yaml")
    check(problems)


# ------------------------------------------------------------------------------------------- training


class Trainer:
    """One run: its model, its data, and its place in the two stages."""

    def __init__(self, cfg: Config, accelerator: Accelerator, captioner: Captioner, train: Split, val: Split | None):
        self.cfg, self.accelerator, self.captioner, self.train, self.val = cfg, accelerator, captioner, train, val
        self.model = captioner  # as accelerate wraps it, once a stage has begun
        self.share = cfg.gradient_accumulation, accelerator.num_processes, accelerator.process_index
        training.prepare_training(captioner, torch_dtype(cfg.precision), accelerator.device)
        self.state = {"stage": next(iter(training.STAGES)), "epoch": 0, "step": 0, "best": math.inf, "logged": 0}
        # steps: of all stages; pending: (loss, tokens) of those that are not yet logged
        self.state |= {"steps": 0, "pending": []}
        self.stopped_by: list[int] = []  # the signal that asks to stop
        self.log = JsonLines(cfg.output / "metrics.jsonl")

    def run(self) -> None:
        """Train the stages from where `state` says."""
        names = list(training.STAGES)
        with stop_signals() as self.stopped_by:
            for name in names[names.index(self.state["stage"]) :]:
                self.state["stage"] = name
                self.train_stage(name)
                self.state["epoch"] = 0

    def train_stage(self, name: str) -> None:
        """Train one stage, epoch by epoch."""
        cfg, stage, accelerator = self.cfg, getattr(self.cfg, name), self.accelerator
        epoch_steps = len(self.epoch())
        if not round(stage.epochs * epoch_steps):
            return accelerator.print(f"{name}: {stage.epochs:g} epochs of {epoch_steps} steps: nothing is trained")
        self.model = accelerator.unwrap_model(self.model)  # its forward keeps the autocast of `prepare`
        accelerator.free_memory()  # the optimizer of the stage before must not be stepped again
        groups = training.set_trainable(self.captioner, name, stage)
        optimizer = torch.optim.AdamW(groups, weight_decay=stage.weight_decay)
        schedule = training.make_schedule(optimizer, stage, epoch_steps)
        self.model, optimizer = accelerator.prepare(self.captioner, optimizer)
        average = training.Average(groups, cfg.ema)  # on the device by now
        parts = {"optimizer": optimizer, "schedule": schedule, "average": average}
        parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
        try:
            for part in self.state.keys() & parts.keys():  # of a resumed run
                parts[part].load_state_dict(self.state.pop(part))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"resume: last/trainer.pt is of another run ({error!r:.99})") from None
        for epoch in range(self.state["epoch"], math.ceil(stage.epochs)):
            # an order of its own for each epoch, so that a resumed run sees what an unbroken one would
            steps = self.epoch(order=1000 * cfg.seed + 100 * list(training.STAGES).index(name) + epoch)
            count = round(stage.epochs * epoch_steps) - epoch * epoch_steps  # may be more than there are
            place, start = {"stage": name, "epoch": epoch + 1}, time.monotonic()
            self.train_epoch(place, steps[:count], parts)
            average.swap()
            self.measure(place | {"steps": self.state["steps"], "seconds": round(time.monotonic() - start, 1)})
            average.swap()
            self.state |= {"epoch": epoch + 1, "step": 0}
            self.save_last(parts)

    def epoch(self, order: int | None = None) -> list[list[Row]]:
        """The batches of an epoch, shuffled by the seed `order`: one an optimizer step, of all processes together."""
        cfg = self.cfg
        return epoch_batches(self.train.captions, cfg.batch_size, cfg.captions_per_row, order, cfg.bucket)

    def inputs(self, batch: list[Row]) -> list[tuple]:
        """The inputs of this process's parts of a batch: for each the photos' features and the packed captions."""
        # every process must take part in the exchange of gradients, so an empty part gets a row, at weight 0
        spare, pin = [(0, self.train.captions[0][:1])], self.accelerator.device.type == "cuda"
        return [self.train.inputs(part or spare, pin) for part in parts_of_process(batch, *self.share)]

    def loss(self, model, features: torch.Tensor, packed) -> torch.Tensor:
        """Sum of the losses of a part's supervised tokens."""
        device = self.accelerator.device
        return model(features.to(device, non_blocking=features.is_pinned()), packed.to(device))[0]

    def train_epoch(self, place: dict, steps: list[list[Row]], parts: dict) -> None:
        """Take the optimizer `steps` that are left of an epoch, behind a progress bar; `place` is for the log."""
        state, done, since = self.state, self.state["step"], time.monotonic()
        label, ahead = "{stage}, epoch {epoch}".format_map(place), prefetch(steps[done:], self.inputs)
        bar = tqdm(ahead, label, initial=done, total=len(steps), mininterval=1)
        self.captioner.train()
        for inputs, batch in zip(bar, steps[done:]):
            loss = self.take_step(inputs, batch, **parts)
            state |= {"step": state["step"] + 1, "steps": state["steps"] + 1}
            state["pending"].append((loss, batch_tokens(batch)))
            together = state["step"] % LOG_STEPS == 0 or state["step"] == len(steps)
            if together:
                bar.set_postfix(self.log_losses(place, steps, time.monotonic() - since, **parts))
                since = time.monotonic()
            parts["schedule"].step()
            stop = self.stop_signal(together)
            if stop or state["step"] % self.cfg.save_steps == 0:
                self.save_last(parts)
            if stop:
                print(f"\nstopped after step {state['step']} of {label}; --resume goes on", file=sys.stderr)
                sys.exit(128 + stop)

    def stop_signal(self, together: bool) -> int:
        """The signal that asks to stop, or 0; of several processes only where they are `together` at the log.

        They must stop after the same step, and to ask each other at every step would let a GPU wait.
        """
        own = torch.tensor(self.stopped_by[:1] or [0])
        if self.accelerator.num_processes == 1:
            return int(own)
        return int(self.accelerator.gather(own.to(self.accelerator.device)).max()) if together else 0

    def take_step(self, inputs: list, batch: list[Row], optimizer, average, **_) -> torch.Tensor:
        """One optimizer step over this process's parts of a batch; returns the sum of all processes' losses."""
        accelerator, total = self.accelerator, torch.zeros((), device=self.accelerator.device)
        parts, tokens = parts_of_process(batch, *self.share), batch_tokens(batch)
        torch.manual_seed(self.cfg.seed + self.state["steps"])  # dropout of a resumed run is that of an unbroken one
        for i, part in enumerate(parts):
            with accelerator.no_sync(self.model) if i + 1 < len(parts) else nullcontext():
                loss = self.loss(self.model, *inputs[i]) * bool(part)
                # the mean over the whole step's tokens; gradients are averaged over processes, hence the factor
                accelerator.backward(loss * accelerator.num_processes / tokens)
            total += loss.detach()
        if self.cfg.max_grad_norm:
            accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return accelerator.reduce(total)

    def log_losses(self, place: dict, steps: list, seconds: float, schedule, **_) -> dict[str, float]:
        """Log what the pending steps gave in so many seconds, and return it for the bar.

        Raises UserError where a loss is not a number. This is where a GPU has to wait, so it is not done at each step.
        """
        pending, step = self.state["pending"], self.state["step"]
        losses = torch.stack([loss.to(self.accelerator.device) for loss, _ in pending]).tolist()
        for number, loss in enumerate(losses, start=step - len(losses)):
            if not math.isfinite(loss):
                photos = sorted({self.train.photos[photo].stem for photo, _ in steps[number]})
                where = f"step {number + 1} of {place['stage']}, epoch {place['epoch']}"
                raise UserError(f"{where}: the loss is {loss}, photos {', '.join(photos)}; a lower lr may help")
        tokens, lr = sum(tokens for _, tokens in pending), schedule.get_last_lr()[-1]  # of LoRA, where it trains
        row = {"loss": round(sum(losses) / tokens, 5), "lr": lr, "tokens_a_second": round(tokens / seconds)}
        row["memory_gb"] = round(memory_used(self.accelerator.device), 2)
        if self.accelerator.is_main_process:
            self.record(place | {"step": step, "steps": self.state["steps"]} | row)
        self.state["pending"] = []
        return row

    # ----------------------------------------------------------------------------------- the end of an epoch

    def record(self, row: dict) -> None:
        """Write a row of metrics.jsonl, and hand its numbers to the tracker, if there is one."""
        self.log.append(row)
        values = {f"{row['stage']}/{name}": value for name, value in row.items() if name != "stage"}
        self.accelerator.log(values, step=self.state["steps"])

    def measure(self, row: dict) -> None:
        """Measure on the validation photos; write the log (`row`), loss.png and, where this is the best, best/."""
        cfg, state = self.cfg, self.state
        self.captioner.eval()
        if self.val:
            row["val_loss"] = self.validation_loss()
        if not self.accelerator.is_main_process:
            return
        self.record(row)
        print("  ".join(f"{key} {round(value, 4) if key.startswith('val') else value}" for key, value in row.items()))
        plot_losses(self.log.rows(), cfg.output / "loss.png")
        # without validation photos the last epoch is the best that is known
        if row.get("val_loss", -math.inf) < state["best"]:
            state["best"] = row.get("val_loss", math.inf)
            save_captioner(self.captioner, cfg.output / "best", torch_dtype(cfg.save_precision))

    def save_last(self, parts: dict) -> None:
        """Write last/, where the run can go on; `parts` are what has a state_dict."""
        accelerator, trained = self.accelerator, [p for p in self.captioner.parameters() if p.requires_grad]
        if not all(values.isfinite().all() for values in (*trained, *(loss for loss, _ in self.state["pending"]))):
            raise UserError("weights or losses are no longer finite, so nothing is saved; a lower lr may help")
        if accelerator.is_main_process:
            self.state["logged"] = len(self.log.rows())
            trainer = self.state | {name: part.state_dict() for name, part in parts.items()}
            save_captioner(self.captioner, self.cfg.output / "last", extra={"trainer.pt": trainer})

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over all supervised tokens of the validation captions."""
        total = torch.zeros((), device=self.accelerator.device)
        batches = epoch_batches(self.val.captions, self.cfg.batch_size, self.cfg.captions_per_row)
        mine = [part for batch in batches for part in parts_of_process(batch, *self.share) if part]
        for inputs in tqdm(prefetch(mine, self.val.inputs), "validate", total=len(mine), leave=False):
            total += self.loss(self.captioner, *inputs)  # not as wrapped: no process waits for another
        return self.accelerator.reduce(total).item() / sum(map(batch_tokens, batches))


def main(cfg: Config) -> None:
    check_settings(cfg)
    model = absolute(CaptionerConfig(cfg.encoder, cfg.projector, cfg.decoder, cfg.lora))
    if cfg.dry_run:
        captioner = build_captioner(model, load_weights=False)
        for name in training.STAGES:
            training.set_trainable(captioner, name, getattr(cfg, name))
        return
    device = pick_device(cfg.device)
    if cfg.precision == "fp16" and device.type != "cuda":
        raise UserError(f"precision: fp16 trains on CUDA alone, the device is {device}; expected bf16 or float32")
    sources = (cfg.annotations, cfg.images), (cfg.val_annotations, cfg.val_images or cfg.images)
    photos, val_photos = read_splits(cfg.data, *sources, (cfg.limit, cfg.val_limit), cfg.skip_bad_photos)

    if device.index is not None:
        torch.cuda.set_device(device)
    precision = "no" if cfg.precision == "float32" else cfg.precision
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=5))  # with a process that does not answer
    where = {"log_with": cfg.tracker, "project_dir": cfg.output, "kwargs_handlers": [patience]}
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, **where)
    if accelerator.is_main_process:
        lock(cfg.output / "metrics.jsonl")
    state = resumed_state(cfg)
    torch.manual_seed(cfg.seed)
    captioner = build_captioner(model)
    captioner.encoder.to(accelerator.device)
    train = prepare_split(captioner, photos, cfg.features, cfg.skip_bad_photos)
    val = prepare_split(captioner, val_photos, cfg.features, cfg.skip_bad_photos) if val_photos else None
    if cfg.consensus:
        weigh_by_agreement(train, agreement({one.stem: list(one.captions) for one in train.photos}), cfg.consensus)
    if state:
        load_trained(captioner, cfg.output / "last")
    trainer = Trainer(cfg, accelerator, captioner, train, val)
    trainer.state |= state | {"inputs": inputs_hash(state, train, val)}
    if accelerator.is_main_process:
        begin_run(cfg, bool(state), trainer.state["logged"])
    accelerator.wait_for_everyone()
    accelerator.init_trackers("captioning", {name: str(value) for name, value in flatten(settings_of(cfg)).items()})
    trainer.run()
    accelerator.end_training()
    if not trainer.state["steps"]:
        raise NothingDone("no step was taken; expected more photos, or more epochs")
    print(f"captioner: {find_checkpoint(cfg.output)}")


if __name__ == "__main__":
    run(main, Config)
