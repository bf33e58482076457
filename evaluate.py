"""Score captions: CIDEr-D, CLIPScore and other metrics, with intervals; compare runs.

    python evaluate.py --predictions captions.json --annotations val.json --images photos/
    python evaluate.py --predictions captions.json --annotations val.json --metrics cider bleu rouge
    python evaluate.py --predictions best.json moderate.json diverse.json --data ROOT --page scores.html
    python evaluate.py --predictions captions.json --annotations val.json --metrics chair --instances instances_val.json

The second command needs no photo and no model: it takes seconds on a CPU. The third compares each run with the first,
photo by photo. `--pred_file`, `--images_root` and `--annotation_file` are other names of `--predictions`, `--images`
and `--annotations`. The scores of every photo go to a JSON file. The last line of stdout gives CIDEr and CLIPScore of
the (first) run.
"""

import common  # noqa: F401  Ctrl-C ends what is loaded below without a traceback

# isort: split
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import PositiveFloat, PositiveInt

from common.config import CommonSettings, NothingDone, UserError, check, plain, run as run_script, say
from common.device import pick_device
from common.files import FEATURES, check_output, read_text, write_json
from data.evaluation import Inputs, MissingPolicy, match, read_references, read_runs
from data.instances import Instances, read_instances
from data.photos import first_of
from metrics.clipscore import WEIGHT, ImageTower, clip_scores, encode_captions, load_clip, ref_clip_scores
from metrics.statistics import Score, interval, mean_score, paired
from metrics.table import LABELS, MEANINGS, METRICS
from models.features import encode_files
from pages.scores import write_scores_page

__doc__ += "\nScores:\n" + "\n".join(f"    {LABELS[name]}: {meaning}" for name, meaning in MEANINGS.items())
ALIASES = {"pred_file": "predictions", "images_root": "images", "annotation_file": "annotations"}
CLIP = {"clipscore", "refclipscore"}  # the metrics that read photos
Scores = dict[str, Score]  # by metric


@dataclass(frozen=True)
class Config(CommonSettings):
    """What is scored, against what, and how."""

    predictions: list[Path]
    """JSON files {image stem: caption}, or another form of data/forms.py; each is compared with the first."""
    data: Path | None = None
    """Folder with val.json (or SPLIT.json) and images/; or name the two below."""
    annotations: Path | None = None
    """The references, in a form that data/forms.py reads: COCO, Karpathy, Flickr8k, tables, JSON."""
    images: Path | None = None
    """Folder of the photos; only CLIPScore reads them, and finds them itself where they lie beside the annotations."""
    metrics: list[Literal[(*METRICS, *sorted(CLIP))]] = field(default_factory=lambda: ["cider", "clipscore"])
    """What to score; what each score means stands at the top of this help."""
    instances: Path | None = None
    """COCO instances: the objects in each photo, for chair."""
    missing: MissingPolicy = "error"
    """A photo without a prediction is a mistake, or is left out for all runs (skip), or scores 0 (zero)."""
    split: str | None = None
    """Split to score: of the annotations, where they hold several, or of `data` (val without it)."""
    clip_model: str = "ViT-B-32-quickgelu"
    """A model name of open_clip, local-dir:FOLDER or hf-hub:REPO."""
    clip_pretrained: str = "openai"
    """open_clip's tag of the weights, or a weights file (PAC-S's, say); not read with local-dir: and hf-hub:."""
    clip_prefix: str = ""
    """Put before captions and references for CLIP; "A photo depicts " in the paper's own code."""
    clip_scale: PositiveFloat = WEIGHT
    """What the cosine is multiplied by: 2.5 in CLIPScore, 2 in PAC-S."""
    features: Path = FEATURES
    """Folder in which the photos' CLIP vectors are kept, so that the next run of captions reads no photo."""
    batch_size: PositiveInt = 32
    """Photos, or captions, that CLIP takes at a time."""
    output: Path | None = None
    """Scores as JSON; without it NAME.scores.json beside the predictions NAME.json, or scores.json for several runs,
    where older scores are replaced."""
    page: Path | None = None
    """Write an HTML page of every photo with its captions, references and scores; an older one is replaced."""


def check_settings(cfg: Config) -> Path:
    """Check what can be checked before anything is scored, and return where the scores go. Raises UserError."""
    if "chair" in cfg.metrics and not cfg.instances:
        raise UserError("instances: expected COCO's instances of the photos, which chair compares with")
    first = cfg.predictions[0]
    beside = first.name.removesuffix(".json") + ".scores.json" if len(cfg.predictions) == 1 else "scores.json"
    path = cfg.output or first.with_name(beside)
    check_output(path, cfg.overwrite or cfg.output is None)
    if path.exists() and '"corpus": {' not in read_text(path, "older scores"):
        raise UserError(f"output: {path} exists and holds no scores; give another name")
    if cfg.page:
        if cfg.page.suffix.lower() not in (".html", ".htm") or cfg.page == path:
            raise UserError(f"page: expected the name of an HTML file of its own, got {cfg.page}")
        check_output(cfg.page, overwrite=True, key="page")
    return path


def score_with_clip(inputs: Inputs, cfg: Config) -> list[Scores]:
    """CLIPScore and, where it is asked for, RefCLIPScore of each run, on the photos that can be read.

    The photos' vectors come from the cache if they are there. Raises NothingDone where CLIP cannot be loaded, or no
    photo be read.
    """
    clip = load_clip(cfg.clip_model, cfg.clip_pretrained, pick_device(cfg.device))
    features, good, bad = encode_files(ImageTower(clip), inputs.photos, cfg.features, cfg.batch_size, dtype=np.float32)
    if bad:
        say(f"CLIPScore is the mean of {len(good)} of {len(inputs.photos)} photos")
    stems = [inputs.photos[i].stem for i in good]
    photos = features[range(len(good))][:, 0].to(clip.device)

    def encode(texts: list[str]):
        return encode_captions(clip, [cfg.clip_prefix + text for text in texts], cfg.batch_size)

    references = None
    if "refclipscore" in cfg.metrics:
        vectors, _ = encode([text for stem in stems for text in inputs.references[stem]])
        references = vectors.split([len(inputs.references[stem]) for stem in stems])
    found = []
    for run in inputs.runs:
        captions, cut = encode([run.captions[stem] for stem in stems])
        scores = clip_scores(photos, captions, cfg.clip_scale)
        scores *= scores.new_tensor([bool(run.captions[stem].strip()) for stem in stems])  # an empty caption scores 0
        values = {"clipscore": scores}
        if references:
            values["refclipscore"] = ref_clip_scores(scores, captions, references)
        found.append({name: mean_score(dict(zip(stems, one.tolist()))) for name, one in values.items()})
        if any(cut):
            which = first_of([stem for stem, long in zip(stems, cut) if long])
            say(f"{run.name}: CLIP reads the caption of {which} only in part: it is longer than CLIP's text input")
    return found


def score_runs(inputs: Inputs, instances: Instances | None, cfg: Config) -> tuple[list[Scores], list[str]]:
    """The scores of each run, and for each metric that cannot run one line that says why."""
    if len(inputs.photos) == 1 and "cider" in cfg.metrics:
        say("CIDEr of a single photo is always 0: n-grams that are in the references of all photos have no weight")
    scores: list[Scores] = [{} for _ in inputs.runs]
    failures = []
    for name in [name for name in METRICS if name in cfg.metrics]:
        try:
            found = [METRICS[name](inputs.references, run.captions, instances) for run in inputs.runs]
            scores = [known | new for known, new in zip(scores, found)]
        except NothingDone as reason:
            failures.append(f"{name} cannot run: {reason}")
    if CLIP & set(cfg.metrics):
        try:
            scores = [known | new for known, new in zip(scores, score_with_clip(inputs, cfg))]
        except NothingDone as reason:
            failures.append(f"CLIPScore: {reason}")
    return scores, failures


def to_json(name: str, scores: Scores, stems: list[str], cfg: Config) -> dict[str, Any]:
    """A run as it stands in scores.json; CIDEr and CLIPScore are always there, None where there is no score."""
    sure = {name: score for name, score in scores.items() if score.of_sums and len(score.photos) > 1}
    photos = {"cider": {}, "clipscore": {}} | {name: score.photos for name, score in scores.items() if score.photos}
    return {
        "name": name,
        "n": len(stems),
        "scored": {name: len(of_photos) for name, of_photos in photos.items() if of_photos},
        "versions": {name: version(name) for name in ("pycocoevalcap", "open_clip_torch")},
        "settings": plain(cfg),
        "corpus": {"cider": None, "clipscore": None} | {name: score.corpus for name, score in scores.items()},
        "intervals": {name: interval(score, stems, cfg.seed) for name, score in sure.items()},
        "photos": {stem: {name: of_photos.get(stem) for name, of_photos in photos.items()} for stem in stems},
    }


def compare(runs: list[dict[str, Any]], scores: list[Scores], stems: list[str], seed: int) -> list[dict[str, Any]]:
    """How each run differs from the first one, by each metric that has an interval."""
    return [
        {"run": runs[i]["name"], "against": runs[0]["name"], "metric": metric}
        | paired(scores[0][metric], scores[i][metric], stems, seed)
        for metric in runs[0]["intervals"]
        for i in range(1, len(runs))
    ]


def table(runs: list[dict[str, Any]], differences: list[dict[str, Any]]) -> str:
    """Scores with their intervals, and each run's differences from the first one, as text."""
    lines = [f"{runs[0]['n']} photos; 95% bootstrap intervals over photos"]
    if len(runs) > 1:
        lines[0] += f"; difference from {runs[0]['name']} on the same photos, p of a permutation test"
    changes = {(change["run"], change["metric"]): change for change in differences}
    width = max(len(run["name"]) for run in runs)
    for metric in [name for name, score in runs[0]["corpus"].items() if score is not None]:
        lines.append(f"\n{LABELS[metric]}")
        for run in runs:
            line = f"  {run['name']:{width}}  {run['corpus'][metric]:.4f}"
            if metric in run["intervals"]:
                line += " [{:.4f}, {:.4f}]".format(*run["intervals"][metric])
            if change := changes.get((run["name"], metric)):
                line += "   {difference:+.4f} [{low:+.4f}, {high:+.4f}]  p {p:.4f}".format_map(change)
            lines.append(line)
    return "\n".join(lines)


def fixed_point(score: float | None) -> str:
    """All digits of a score, never in scientific notation; `n/a` where there is none."""
    return "n/a" if score is None else np.format_float_positional(score, trim="0")


def main(cfg: Config) -> None:
    annotations, annotated = read_references(cfg.data, cfg.annotations, cfg.images, cfg.split, cfg.missing)
    captions = read_runs(cfg.predictions, annotated)
    inputs = match(captions, annotated, annotations, cfg.limit, cfg.missing, clip=bool(CLIP & set(cfg.metrics)))
    output = check_settings(cfg)
    instances = read_instances(cfg.instances) if "chair" in cfg.metrics else None
    unknown = [photo.stem for photo in inputs.photos if instances and photo.stem not in instances.objects]
    check([f"instances: {cfg.instances} does not know {first_of(unknown)}"] if unknown else [])
    for line in inputs.notices:
        say(line)

    scores, failures = score_runs(inputs, instances, cfg)
    stems = [photo.stem for photo in inputs.photos]
    runs = [to_json(run.name, of_run, stems, cfg) for run, of_run in zip(inputs.runs, scores)]
    cider, clipscore = (fixed_point(runs[0]["corpus"][metric]) for metric in ("cider", "clipscore"))
    means = f"CIDEr: {cider} | CLIPScore: {clipscore}"
    if not scores[0]:
        print(means)
        raise NothingDone("; ".join(failures))
    differences = compare(runs, scores, stems, cfg.seed)
    write_json(output, runs[0] if len(runs) == 1 else {"runs": runs, "paired": differences})
    print(table(runs, differences))
    print(f"\nscores of every photo: {output}")
    if cfg.page:
        write_scores_page(cfg.page, inputs, runs)
        print(f"page: {cfg.page}")
    for line in failures:
        say(line)
    print(means)


if __name__ == "__main__":
    run_script(main, Config, ALIASES)
