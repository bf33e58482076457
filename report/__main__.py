"""The report: P1, P2 and P3 by their scripts, and one page of what was found.

    python -m report                                    # drawn scenes and stand-ins, offline: `make report`
    python -m report --demo                             # only the demo's steps: `make demo`
    python -m report --data ROOT                        # the published setting: real weights, your photos
    python -m report --data ROOT --model llava-hf/llava-1.5-7b-hf --configs configs/p2_packed.yaml

Each step is a command that a user can type; report/steps.yaml lists them. A step that was done by the same command from
the same inputs is not done again, and a stopped report goes on when the same command is given again. The page is
OUTPUT/index.html, and OUTPUT/report.pdf where Chromium is there to print it.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt

from common.config import UserError, check, parse_config, run
from data.annotations import find_data
from data.predictions import read_predictions
from report.page import write_report
from report.results import read
from report.stamps import run_steps
from report.steps import PHOTO, Setting, make_steps

SIX = ("cider", "cider_shuffled", "cider_llava_best", "match_at_1", "match_at_1_last_mean", "pointing")
SMALL = {"scenes": " --train 300 --val 40", "steps": " --clip_steps 60 --gpt2_steps 60 --llava_steps 60"}


@dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with train.json, val.json and images/; without it scenes are drawn, and small models stand in."""
    model: str = "llava-hf/llava-1.5-7b-hf"
    """With `data`: a vision-language model of transformers, hub id or local folder."""
    configs: list[Path] | None = None
    """With `data`: configs of p2_train.py to compare, the first of which is shown; if none, the published ranks."""
    seeds: PositiveInt = 2
    """How often each config is trained, with the seeds 0, 1, ..."""
    instances: Path | None = None
    """With `data`: COCO instances with masks of the validation photos, for the grounding scores."""
    clip_model: str | None = None
    """With `data`: the CLIP that scores, as evaluate.py takes it; if none, its default."""
    limit: PositiveInt | None = None
    """Caption and score only the first so many validation photos."""
    demo: bool = False
    """Without `data`: only the steps of the demo, and no page."""
    small: bool = False
    """Without `data`: few scenes and short training, in runs/small, to try the report itself."""
    output: Path = Path("runs/report")
    """Folder of the page, and with `data` of all results."""


def drawn_setting(cfg: Config) -> Setting:
    """Drawn scenes and stand-ins, with ranks at a size that a CPU trains in minutes."""
    work = Path("runs/small" if cfg.small else "runs/demo")
    data, standins = work / "shapes", work / "standins"
    flags = {"clip": f" --clip_model local-dir:{standins}/clip"}
    if cfg.small:
        flags |= SMALL | {"train": f" --encoder.weights {standins}/clip --decoder.model {standins}/gpt2"}
    captioner, *configs = (Path(f"configs/shapes{name}.yaml") for name in ("", "_r8", "_r16", "_r32"))
    model, masks = f"{standins}/llava", data / "instances_val.json"
    return Setting(work, data, model, captioner, tuple(configs), cfg.seeds, masks, "rel", flags, cfg.limit, drawn=True)


def real_setting(cfg: Config) -> Setting:
    """Real weights. Raises UserError for what is wrong with the data or a config, before anything runs."""
    import p2_train  # it loads torch, which takes seconds

    for split in ("train", "val"):
        find_data(cfg.data, split)
    check([f"instances: {cfg.instances}: no such file"] if cfg.instances and not cfg.instances.is_file() else [])
    configs = tuple(cfg.configs or (Path(f"configs/p2_lora_r{rank}.yaml") for rank in (8, 16, 32)))
    for config in configs:
        parse_config(p2_train.Config, ["--config", str(config)])
    flags = {"clip": f" --clip_model {cfg.clip_model}"} if cfg.clip_model else {}
    which = cfg.model, configs[0], configs, cfg.seeds, cfg.instances
    return Setting(cfg.output, cfg.data, *which, "fuse", flags, cfg.limit)


def print_pdf(page: Path) -> Path | None:
    """Print the page by headless Chromium; None where there is none, or where it fails."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    pdf = page.with_name("report.pdf")
    pdf.unlink(missing_ok=True)
    if browser:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer", "--virtual-time-budget=20000"]
        command = [browser, *flags, f"--print-to-pdf={pdf.resolve()}", page.resolve().as_uri()]
        subprocess.run(command, capture_output=True, timeout=300)
    return pdf if pdf.exists() else None


def main(cfg: Config) -> None:
    if cfg.data and (cfg.demo or cfg.small):
        raise UserError("demo, small: these are of the drawn scenes; expected no data with them")
    if not cfg.data and (cfg.configs or cfg.instances or cfg.clip_model or cfg.model != Config.model):
        raise UserError("data: expected it with model, configs, instances and clip_model, not given")
    s = real_setting(cfg) if cfg.data else drawn_setting(cfg)
    steps = make_steps(s, ("demo",) if cfg.demo else ("demo", "report"))
    run_steps(steps)
    figures = read(s.work / "summary.json")
    for name in (name for name in (figures if cfg.demo else SIX) if figures.get(name) is not None):
        print(f"  {name:28}{figures[name]:>8.3f}")
    if s.drawn:
        print(f"\n  {PHOTO.name}: {read_predictions(s.work / 'photo.json')[PHOTO.stem]}")
    pages = [s.work / "scores.html", *(s.work / f"look_{name}/index.html" for name in ("photo", "ours", "llava"))]
    if not cfg.demo:
        write_report(cfg.output / "index.html", s, steps)
        pages = [cfg.output / "index.html", print_pdf(cfg.output / "index.html")]
    print("\nPages: " + ", ".join(map(str, filter(None, pages))))


if __name__ == "__main__":
    run(main, Config)
