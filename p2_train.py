"""P2, training: photos + captions -> a run: a projector and LoRA, trained in two stages on frozen models.

    python p2_train.py --config configs/p2_lora_r32.yaml --data DATA --output runs/p2_r32   # the published setting
    python p2_train.py --config configs/p2_packed.yaml --data DATA --output runs/p2_packed  # what we recommend
    python p2_train.py --config configs/p2_lora_r32.yaml --dry_run                          # parts and parameters
    python p2_train.py --config configs/shapes.yaml --data runs/demo/shapes --output runs/demo/p2  # minutes on a CPU

Stage `align` trains the projector alone, stage `finetune` the projector and LoRA. A run folder holds config.yaml,
metrics.jsonl, loss.png, best/ (lowest validation loss) and last/ (the end of the last epoch, where `--resume` goes on).
"""

import hashlib
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from tqdm import tqdm

from common.config import CommonSettings, UserError, check, flatten, plain, run
from common.device import Precision, pick_device, torch_dtype
from common.files import JsonLines, folder_problems, lock, remove_folder, restore_folder, written_whole
from data.annotations import read_splits
from data.batches import Row, batch_tokens, epoch_batches, optimizer_steps
from data.prefetch import prefetch
from metrics.cider import agreement, cider, find_java
from models import training
from models.captioner import Captioner, CaptionerConfig, build_captioner
from models.checkpoint import absolute, check_checkpoint, find_checkpoint, load_trained, save_captioner
from models.consensus import count_frequencies
from models.decoder import attend_with, causal_lm, check_decoder
from models.decoding import Decoding
from models.encoder import check_encoder
from models.splits import Split, prepare_split, weigh_by_agreement
from pages.figures import plot_losses


@dataclass(frozen=True)
class Config(CommonSettings, CaptionerConfig):
    """Settings: the captioner's encoder, projector, decoder and lora, and these; the defaults are the published run."""

    data: Path | None = None
    """Folder with train.json, val.json and images/; or name the four below."""
    annotations: Path | None = None
    """Training captions, in a form that data/forms.py reads: COCO, Karpathy, Flickr8k, LLaVA, tables, JSON, Parquet."""
    images: Path | None = None
    """Folder of the training photos."""
    val_annotations: Path | None = None
    """Validation captions, in the same forms. A file that holds several splits may be named for both."""
    val_images: Path | None = None
    """Folder of the validation photos."""
    output: Path | None = None
    """Run folder to write."""
    resume: bool = False
    """Go on with the run in `output` from the end of its last epoch."""
    dry_run: bool = False
    """Print the parts and their trainable parameters, and stop: no data, no network, no weights."""

    align: training.Stage = training.Stage()
    """Stage 1: the projector alone."""
    finetune: training.Stage = training.Stage(epochs=3, schedule="warm_restarts", min_lr=1e-4)
    """Stage 2: projector and LoRA."""

    batch_size: PositiveInt = 12
    """Captions in a batch, for each process."""
    captions_per_row: PositiveInt = 1
    """How many captions of one photo share its image prefix in one row. The gradients are the same, with less work."""
    bucket: bool = False
    """Put rows of similar length into one batch, which saves padding."""
    gradient_accumulation: PositiveInt = 1
    """Batches for each optimizer step."""
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
    val_cider: bool = False
    """Caption the validation photos after each epoch and score them with CIDEr."""
    skip_bad_photos: bool = False
    """Go on without photos that are missing or cannot be decoded, and without captions that the decoder has no
    positions for, instead of ending with an error."""
    features: Path = Path("runs/features")
    """Cache of encoded photos, shared by all runs."""
    val_limit: PositiveInt | None = None
    """Only the first so many validation photos."""


# ------------------------------------------------------------------------------------------- before training


def check_settings(cfg: Config) -> None:
    """Raise a UserError for what is wrong with the settings alone."""
    problems = check_encoder(cfg.encoder) + check_decoder(cfg.decoder)
    problems += training.check_stage("align", cfg.align) + training.check_stage("finetune", cfg.finetune)
    if not cfg.align.epochs and not cfg.finetune.epochs:
        problems.append("finetune.epochs: expected at least one stage that trains, got 0 epochs in all")
    if cfg.ema == 1:
        problems.append("ema: expected less than 1, since the average would never change, got 1")
    if cfg.batch_size % cfg.captions_per_row:
        expected = f"a multiple of captions_per_row {cfg.captions_per_row}"
        problems.append(f"batch_size: expected {expected}, got {cfg.batch_size}")
    if not cfg.dry_run:
        if (cfg.data is None) == (cfg.annotations is None) or (cfg.data and cfg.val_annotations):
            problems.append("data: expected either data or annotations, got " + ("both" if cfg.data else "neither"))
        hint = "--resume goes on with it, --overwrite replaces it"
        problems += folder_problems(cfg.output, cfg.overwrite or cfg.resume, hint, marker="config.yaml")
    check(problems)
    if cfg.val_cider or cfg.consensus:
        find_java()


# ------------------------------------------------------------------------------------------- the run folder


def settings_of(cfg: Config) -> dict:
    """What config.yaml holds: all that makes the run what it is, as plain values."""
    return {key: value for key, value in plain(cfg).items() if key not in ("overwrite", "resume", "dry_run")}


def resumed_state(cfg: Config) -> dict | None:
    """The trainer's state in last/; None where there is none yet. Raises UserError if the settings have changed."""
    last = cfg.output / "last"
    restore_folder(last)
    if not cfg.resume or not (last / "trainer.pt").exists():
        return None
    stored = yaml.safe_load((cfg.output / "config.yaml").read_text(encoding="utf-8"))
    before = flatten(settings_of(Config())) | flatten(stored)
    # the same run on another machine; that the captions are the same is checked when they have been read
    elsewhere = ("device", "features", "output", "data", "annotations", "images", "val_annotations", "val_images")
    now = {key: value for key, value in flatten(settings_of(cfg)).items() if key not in elsewhere}
    changed = [f"resume: {key} was {before[key]}, is {now[key]}" for key in now if now[key] != before[key]]
    check(changed and [*changed[:4], "give the run's own settings (config.yaml), or another output for a new run"])
    check_checkpoint(last)
    return torch.load(last / "trainer.pt", map_location="cpu", weights_only=True)


def begin_run(cfg: Config, resumed: bool, logged: int) -> None:
    """Write config.yaml and keep the first `logged` rows of the metrics log; a new run starts without folders."""
    if not resumed:
        remove_folder(cfg.output / "best")
        remove_folder(cfg.output / "last")
    JsonLines(cfg.output / "metrics.jsonl").keep(logged)  # what a killed run logged after its last save is done again
    with written_whole(cfg.output / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings_of(cfg), sort_keys=False), encoding="utf-8")


# ------------------------------------------------------------------------------------------- training


class Trainer:
    """One run: its model, its data, and its place in the two stages."""

    def __init__(self, cfg: Config, accelerator: Accelerator, captioner: Captioner, train: Split, val: Split | None):
        self.cfg, self.accelerator, self.captioner, self.train, self.val = cfg, accelerator, captioner, train, val
        self.model = captioner  # as accelerate wraps it, once a stage has begun
        self.attention = training.prepare_training(captioner, torch_dtype(cfg.precision), accelerator.device)
        self.state = {"stage": next(iter(training.STAGES)), "epoch": 0, "best": math.inf, "logged": 0}
        self.log = JsonLines(cfg.output / "metrics.jsonl")

    def run(self) -> None:
        """Train the stages from where `state` says."""
        names = list(training.STAGES)
        for name in names[names.index(self.state["stage"]) :]:
            self.train_stage(name)
            self.state["epoch"] = 0

    def train_stage(self, name: str) -> None:
        """Train one stage, epoch by epoch."""
        cfg, stage, accelerator = self.cfg, getattr(self.cfg, name), self.accelerator
        epoch_steps = len(self.optimizer_steps())
        if not round(stage.epochs * epoch_steps):
            return accelerator.print(f"{name}: {stage.epochs:g} epochs of {epoch_steps} steps: nothing is trained")
        self.model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        accelerator.free_memory()  # the optimizer of the stage before must not be stepped again
        groups = training.set_trainable(self.captioner, name, stage)
        optimizer = training.make_optimizer(groups, stage)
        schedule = training.make_schedule(optimizer, stage, epoch_steps)
        self.model, optimizer = accelerator.prepare(self.captioner, optimizer)
        average = training.Average(training.parameters_of(groups), cfg.ema)  # on the device by now
        parts = {"optimizer": optimizer, "schedule": schedule, "average": average}
        for part in self.state.keys() & parts.keys():  # resumed inside this stage
            parts[part].load_state_dict(self.state.pop(part))
        for epoch in range(self.state["epoch"], math.ceil(stage.epochs)):
            start = time.monotonic()
            # an order of its own for each epoch, so that a resumed run sees what an unbroken one would
            steps = self.optimizer_steps(order=1000 * cfg.seed + 100 * list(training.STAGES).index(name) + epoch)
            count = round(stage.epochs * epoch_steps) - epoch * epoch_steps  # may be more than there are
            place = {"stage": name, "epoch": epoch + 1}
            self.train_epoch(place, steps[:count], **parts)
            self.state |= place
            with average.in_place():
                self.measure(place | {"seconds": round(time.monotonic() - start, 1)})
            self.save_last(parts)

    def optimizer_steps(self, order: int | None = None) -> list[tuple[list[list[Row]], int]]:
        """An epoch, shuffled by the seed `order`: batches of this process and tokens of all, by optimizer step."""
        cfg, accelerator = self.cfg, self.accelerator
        batches = epoch_batches(self.train.captions, cfg.batch_size, cfg.captions_per_row, order, cfg.bucket)
        share = accelerator.num_processes, accelerator.process_index
        return list(optimizer_steps(batches, cfg.gradient_accumulation, *share))

    def inputs(self, step: tuple[list[list[Row]], int]) -> list[tuple]:
        """The inputs of an optimizer step's batches: for each the photos' features and the packed captions."""
        # every process must take part in the exchange of gradients, so an empty batch gets a row, at weight 0
        spare = [(0, self.train.captions[0][:1])]
        return [self.train.inputs(batch or spare, self.accelerator.device.type == "cuda") for batch in step[0]]

    def loss(self, model, features: torch.Tensor, packed) -> torch.Tensor:
        """Sum of the losses of a batch's supervised tokens."""
        device = self.accelerator.device
        return model(features.to(device, non_blocking=features.is_pinned()), packed.to(device))[0]

    def train_epoch(self, place: dict, steps: list, optimizer, schedule, average: training.Average) -> None:
        """Take the optimizer `steps`, behind a progress bar; `place` is the stage and the epoch, for the log."""
        accelerator, start = self.accelerator, time.monotonic()
        label, main = "{stage}, epoch {epoch}".format_map(place), accelerator.is_main_process
        bar = tqdm(prefetch(steps, self.inputs), label, total=len(steps), mininterval=1, disable=not main)
        captions, token_sum, loss_sum = 0, 0, torch.zeros((), device=accelerator.device)
        self.captioner.train()
        for step, (inputs, (batches, tokens)) in enumerate(zip(bar, steps), start=1):
            for i, batch in enumerate(batches):
                with accelerator.no_sync(self.model) if i + 1 < len(batches) else nullcontext():
                    loss = self.loss(self.model, *inputs[i]) * bool(batch)
                    # the mean over the whole step's tokens; gradients are averaged over processes, hence the factor
                    accelerator.backward(loss * accelerator.num_processes / tokens)
                loss_sum += loss.detach()
                captions += sum(len(row) for _, row in batch)
            if self.cfg.max_grad_norm:
                accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
            lr = schedule.get_last_lr()[-1]  # of LoRA, where it trains
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            schedule.step()
            token_sum += tokens
            if step % 20 == 0 or step == len(steps):  # reading the loss makes a GPU wait, so not at each step
                mean = accelerator.reduce(loss_sum, "sum").item() / token_sum
                rate = captions / (time.monotonic() - start)
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}", captions_a_second=f"{rate:.1f}")
                if main:
                    self.log.append(place | {"step": step, "loss": round(mean, 5), "lr": lr})
                loss_sum, token_sum = torch.zeros_like(loss_sum), 0

    # ----------------------------------------------------------------------------------- the end of an epoch

    def measure(self, row: dict) -> None:
        """Measure on the validation photos; write the log (`row`), loss.png and, where this is the best, best/."""
        cfg, state = self.cfg, self.state
        self.captioner.eval()
        if self.val:
            row["val_loss"] = self.validation_loss()
        if not self.accelerator.is_main_process:
            return
        if cfg.val_cider:
            row["val_cider"] = self.validation_cider()
        self.log.append(row)
        print("  ".join(f"{key} {round(value, 4) if key.startswith('val') else value}" for key, value in row.items()))
        plot_losses(self.log.rows(), cfg.output / "loss.png")
        # without validation photos the last epoch is the best that is known
        if row.get("val_loss", -math.inf) < state["best"]:
            state["best"] = row.get("val_loss", math.inf)
            save_captioner(self.captioner, cfg.output / "best", torch_dtype(cfg.save_precision))

    def save_last(self, parts: dict) -> None:
        """Write last/, where the run can go on; `parts` are what has a state_dict."""
        if self.accelerator.is_main_process:
            self.state |= {"logged": len(self.log.rows()), "rng": torch.get_rng_state()}
            trainer = self.state | {name: part.state_dict() for name, part in parts.items()}
            save_captioner(self.captioner, self.cfg.output / "last", extra={"trainer.pt": trainer})

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over all supervised tokens of the validation captions."""
        total = torch.zeros((), device=self.accelerator.device)
        batches = epoch_batches(self.val.captions, self.cfg.batch_size, self.cfg.captions_per_row)
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        for inputs in tqdm(prefetch(mine, self.val.inputs), "validate", total=len(mine), leave=False):
            total += self.loss(self.captioner, *inputs)  # not as wrapped: no process waits for another
        return self.accelerator.reduce(total, "sum").item() / sum(map(batch_tokens, batches))

    def validation_cider(self) -> float:
        """CIDEr-D of greedy captions of the validation photos."""
        photos, predictions = self.val.photos, {}
        lm = causal_lm(self.captioner.decoder)
        for start in tqdm(range(0, len(photos), 32), "caption", leave=False):
            part = range(start, min(start + 32, len(photos)))
            with self.accelerator.autocast(), attend_with(lm, "sdpa", after=self.attention):
                features = self.val.features[part].to(self.accelerator.device)
                captions = self.captioner.generate_from(features, {"greedy": Decoding()}, {"greedy": ()})["greedy"]
            predictions |= {photos[i].stem: self.captioner.text(ids) for i, ids in zip(part, captions)}
        return cider({photo.stem: list(photo.captions) for photo in photos}, predictions)[0]


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
    if device.index is not None:
        torch.cuda.set_device(device)
    precision = "no" if cfg.precision == "float32" else cfg.precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    unlock = lock(cfg.output) if accelerator.is_main_process else lambda: None
    state = resumed_state(cfg)
    sources = (cfg.annotations, cfg.images), (cfg.val_annotations, cfg.val_images or cfg.images)
    photos, val_photos = read_splits(cfg.data, *sources, (cfg.limit, cfg.val_limit), cfg.skip_bad_photos)
    if cfg.val_cider and not val_photos:
        raise UserError("val_cider: needs validation photos, none given")
    data = hashlib.blake2b(repr([(photo.stem, photo.captions) for photo in photos]).encode()).hexdigest()
    if state and state.setdefault("data", data) != data:
        raise UserError("resume: the training photos or their captions are not those that the run began with")
    torch.manual_seed(cfg.seed)
    captioner = build_captioner(model)
    captioner.encoder.to(accelerator.device)
    with accelerator.main_process_first():  # the others find the features in the cache
        train = prepare_split(captioner, photos, cfg.features, cfg.skip_bad_photos)
        val = prepare_split(captioner, val_photos, cfg.features, cfg.skip_bad_photos) if val_photos else None
    captioner.frequencies = count_frequencies(photo.captions for photo in train.photos[:20_000])  # enough, if many
    if cfg.consensus:
        scores = agreement({photo.stem: list(photo.captions) for photo in train.photos})
        weigh_by_agreement(train, scores, cfg.consensus)
    if state:
        load_trained(captioner, cfg.output / "last")
        torch.set_rng_state(state.pop("rng"))
    trainer = Trainer(cfg, accelerator, captioner, train, val)
    trainer.state |= state or {"data": data}
    if accelerator.is_main_process:
        begin_run(cfg, bool(state), trainer.state["logged"])
    accelerator.wait_for_everyone()
    trainer.run()
    accelerator.print(f"captioner: {find_checkpoint(cfg.output)}")
    unlock()


if __name__ == "__main__":
    run(main, Config)
