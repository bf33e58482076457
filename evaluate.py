"""Score captions against references and photos: CIDEr-D, CLIPScore and their companions, and how sure the scores are.

    python evaluate.py --predictions captions.json --annotations val.json --images photos/
    python evaluate.py --predictions captions.json --annotations val.json --metrics cider bleu rouge
    python evaluate.py --predictions best.json moderate.json diverse.json --data ROOT --page scores.html

The second needs no photo and no model: seconds on a CPU. The third compares runs: each against the first, photo by
photo. `--pred_file`, `--images_root` and `--annotation_file` are other names of `--predictions`, `--images` and
`--annotations`. Scores of every photo go to a JSON file, the (first) run's two means to the last line of stdout.
"""

import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from common.config import NothingDone, UserError, run
from common.device import pick_device
from common.files import check_output, write_json
from data.evaluation import MissingPolicy, Predicted, first_of, read_scored
from data.features import FeatureCache
from data.photos import Photo
from metrics import overlap
from metrics.cider import cider, find_java
from metrics.clipscore import (
    Clip,
    ClipUnavailable,
    PhotoSide,
    clip_scores,
    encode_captions,
    load_clip,
    ref_clip_scores,
    tokenize,
)  # fmt: skip
from metrics.statistics import Score, interval, mean_score, paired
from pages.scores import write_scores_page

ALIASES = {"pred_file": "predictions", "images_root": "images", "annotation_file": "annotations"}
LABELS = {"cider": "CIDEr-D", "clipscore": "CLIPScore", "refclipscore": "RefCLIPScore", "rouge": "ROUGE-L"}
LABELS |= {"meteor": "METEOR"} | {f"bleu{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}
LABELS |= {"length": "words a caption", "vocabulary": "different words", "unique": "different captions, share"}
LABELS |= {f"distinct{n}": f"distinct-{n}" for n in (1, 2)}


@dataclass(frozen=True)
class Config:
    """What is scored, against what, and how."""

    predictions: list[Path]
    """JSON files {image stem: caption}; from the second on each is compared with the first."""
    data: Path | None = None
    """Folder with val.json (or SPLIT.json) and images/; or name the two below."""
    annotations: Path | None = None
    """The references: COCO style, Karpathy's JSON, Flickr8k's token file or a CSV of image,caption."""
    images: Path | None = None
    """Folder of the photos; only CLIPScore reads them, and finds them itself where they lie beside the annotations."""
    metrics: list[Literal["cider", "clipscore", "bleu", "rouge", "refclipscore", "diversity", "meteor"]] = field(
        default_factory=lambda: ["cider", "clipscore"]
    )
    """What to score; cider is CIDEr-D on PTB tokens, clipscore 2.5 * max(cos, 0) without references."""
    idf: Literal["subset", "full"] = "subset"
    """References that weigh CIDEr's n-grams: of the scored photos (the official way), or all of the annotations."""
    missing: MissingPolicy = "error"
    """A photo without a prediction is a mistake, or is left out for all runs (skip), or scores 0 (zero)."""
    split: str | None = None
    """Split to score: of the annotations, where they hold several, or of `data` (val without it)."""
    limit: PositiveInt | None = None
    """Score the first so many photos of the annotations; predictions for the others are left aside."""
    clip_model: str = "ViT-B-32-quickgelu"
    """A model name of open_clip, local-dir:FOLDER or hf-hub:REPO."""
    clip_pretrained: str = "openai"
    """open_clip's tag of the weights, or a weights file; not read with local-dir: and hf-hub:."""
    clip_prefix: str = ""
    """Put before captions and references for CLIP; "A photo depicts " in the paper's own code."""
    features: Path = Path("runs/features")
    """Folder in which the photos' CLIP vectors are kept, so that the next run of captions reads no photo."""
    batch_size: PositiveInt = 32
    """Photos, or captions, that CLIP takes at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    output: Path | None = None
    """Scores as JSON; without it NAME.scores.json beside the predictions NAME.json, or scores.json for several runs,
    where older scores are replaced."""
    overwrite: bool = False
    """Replace an `output` that is there."""
    page: Path | None = None
    """Write an HTML page of every photo with its captions, references and scores; an older one is replaced."""


def notice(text: str) -> None:
    print(f"evaluate.py: {text}", file=sys.stderr)


def scores_path(cfg: Config) -> Path:
    """Where the scores go. Raises UserError where they cannot, or would replace something other than older scores."""
    first = cfg.predictions[0]
    own = first.with_name(first.name.removesuffix(".json") + ".scores.json")
    path = cfg.output or (own if len(cfg.predictions) == 1 else first.with_name("scores.json"))
    check_output(path, cfg.overwrite or cfg.output is None)
    if path.exists():
        try:
            older = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            older = None
        if not (isinstance(older, dict) and ("corpus" in older or "runs" in older)):
            raise UserError(f"output: {path} exists and holds no scores; give another name")
    return path


class ClipScorer:
    """CLIP at work: the photos' vectors, encoded or taken from the cache, and the references' once for all runs."""

    def __init__(self, clip: Clip, photos: list[Photo], references: dict[str, list[str]] | None, cfg: Config):
        import numpy

        self.clip, self.cfg, self.label = clip, cfg, clip.name
        side = PhotoSide(clip)
        vectors, good, bad = FeatureCache(side, cfg.features, numpy.float32).find(photos, batch_size=cfg.batch_size)
        for error in bad:
            notice(f"{error}; it gets no CLIPScore")
        if 0 < len(good) < len(photos):
            notice(f"CLIPScore is the mean of {len(good)} of {len(photos)} photos")
        self.stems = [photos[i].stem for i in good]
        self.vectors = vectors[range(len(good))][:, 0].to(clip.device) if good else None  # (N, D)
        self.references = None
        if references is not None and good:
            texts, _ = self.encode([text for stem in self.stems for text in references[stem]])
            self.references = texts.split([len(references[stem]) for stem in self.stems])

    def encode(self, texts: list[str]) -> tuple["torch.Tensor", list[bool]]:  # noqa: F821
        """Unit vectors (N, D) of N texts, and which were too long for CLIP."""
        tokens, cut = tokenize(self.clip, [self.cfg.clip_prefix + text for text in texts])
        return encode_captions(self.clip, tokens, self.cfg.batch_size), cut

    def score(self, predicted: Predicted) -> dict[str, Score]:
        """CLIPScore and, where there are references, RefCLIPScore of a run; an empty caption scores 0."""
        import torch

        captions = [predicted.captions[stem] for stem in self.stems]
        texts, cut = self.encode(captions)
        if any(cut):
            which = first_of([stem for stem, long in zip(self.stems, cut) if long])
            notice(f"{predicted.name}: CLIP reads the caption of {which} only in part, longer than its text input")
        scores = clip_scores(self.vectors, texts)
        scores *= torch.tensor([bool(caption.strip()) for caption in captions], device=scores.device)
        found = {"clipscore": scores}
        if self.references:
            found["refclipscore"] = ref_clip_scores(scores, texts, self.references)
        return {name: mean_score(dict(zip(self.stems, values.tolist()))) for name, values in found.items()}


def score_run(
    predicted: Predicted, references: dict[str, list[str]], clip: ClipScorer | None, cfg: Config
) -> dict[str, Score | float]:
    """Every metric of a run that could be had, in the order of the table; figures of diversity are plain numbers."""
    scores: dict[str, Score | float] = {}
    if "cider" in cfg.metrics:
        scores["cider"] = Score(*cider(references, predicted.captions, cfg.idf))
    if clip:
        scores |= clip.score(predicted)
    if "bleu" in cfg.metrics:
        scores |= overlap.bleu(references, predicted.captions)
    if "rouge" in cfg.metrics:
        scores["rouge"] = overlap.rouge(references, predicted.captions)
    if "meteor" in cfg.metrics:
        try:
            scores["meteor"] = overlap.meteor(references, predicted.captions)
        except overlap.MeteorUnavailable as reason:
            notice(f"{predicted.name}: METEOR does not run: {reason}")
    if "diversity" in cfg.metrics:
        scores |= overlap.diversity(predicted.captions)
    return scores


def table(runs: list[Predicted], scores: list[dict[str, Score | float]], stems: list[str]) -> tuple[list, list, str]:
    """Intervals {metric: (low, high)} of each run, differences from the first run, and both as a table to read."""
    intervals, differences, lines = [{} for _ in runs], [], []
    width = max(len(predicted.name) for predicted in runs)
    for metric, first in scores[0].items():
        lines.append(f"\n{LABELS[metric]}")
        for number, (predicted, own) in enumerate(zip(runs, scores)):
            score = own[metric]
            line = f"  {predicted.name:{width}}  {getattr(score, 'corpus', score):.4f}"
            if isinstance(score, Score) and score.of_sums and len(score.photos) > 1:
                low, high = intervals[number][metric] = interval(score, stems)
                line += f" [{low:.4f}, {high:.4f}]"
                if number:
                    change = paired(first, score, stems)
                    which = {"run": predicted.name, "against": runs[0].name, "metric": metric}
                    differences.append(which | change._asdict())
                    line += f"   {change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]  p {change.p:.4f}"
            lines.append(line)
    return intervals, differences, "\n".join(lines)


def extremes(predicted: Predicted, scores: dict[str, Score | float]) -> str:
    """Best and worst photo by each metric, a line each."""
    lines = []
    for metric, score in scores.items():
        if isinstance(score, Score) and len(set(score.photos.values())) > 1:
            for which, choose in (("best", max), ("worst", min)):
                stem = choose(score.photos, key=score.photos.get)
                caption = " ".join(predicted.captions[stem].split())
                lines.append(f"{which} by {LABELS[metric]}: {stem} {score.photos[stem]:.4f} {caption}")
    return "\n".join(lines)


def fixed_point(score: float | None) -> str:
    """All digits of a score, never in scientific notation; `n/a` where there is none."""
    import numpy

    return "n/a" if score is None else numpy.format_float_positional(score, trim="0")


def main(cfg: Config) -> None:
    wants_clip = bool({"clipscore", "refclipscore"} & set(cfg.metrics))
    if not cfg.metrics:
        raise UserError("metrics: expected at least one, such as cider, got none")
    runs, photos, references = read_scored(
        cfg.predictions, cfg.data, cfg.annotations, cfg.images, cfg.split, cfg.limit, cfg.missing, wants_clip, notice
    )
    output = scores_path(cfg)
    if cfg.page:
        if cfg.page.suffix.lower() not in (".html", ".htm") or cfg.page == output:
            raise UserError(f"page: expected the name of an HTML file of its own, got {cfg.page}")
        check_output(cfg.page, overwrite=True, key="page")
    versions = {"pycocoevalcap": version("pycocoevalcap")}
    if set(cfg.metrics) - {"clipscore", "refclipscore"}:
        find_java()
    clip, unavailable = None, ""
    if wants_clip:
        try:
            model = load_clip(cfg.clip_model, cfg.clip_pretrained, pick_device(cfg.device))
        except ClipUnavailable as reason:
            unavailable = f"CLIPScore: {reason}"
        else:
            clip = ClipScorer(model, photos, references if "refclipscore" in cfg.metrics else None, cfg)
            versions |= {"open_clip": version("open_clip_torch"), "clip": clip.label}
            if not clip.stems:
                clip, unavailable = None, "CLIPScore: none of the photos can be read"

    stems = [photo.stem for photo in photos]
    scores = [score_run(predicted, references, clip, cfg) for predicted in runs]
    everywhere = set.intersection(*map(set, scores))  # METEOR may have failed for one of them
    scores = [{name: score for name, score in own.items() if name in everywhere} for own in scores]
    if len(stems) == 1 and "cider" in cfg.metrics and cfg.idf == "subset":
        notice("CIDEr of one photo alone is 0, whatever its caption: no n-gram is rarer than another")
    if any(scores):
        intervals, differences, text = table(runs, scores, stems)
        results = []
        for predicted, own, bounds in zip(runs, scores, intervals):
            corpus = {"cider": None, "clipscore": None}
            corpus |= {name: getattr(score, "corpus", score) for name, score in own.items()}
            by_photo = {"cider": {}, "clipscore": {}}
            by_photo |= {name: score.photos for name, score in own.items() if isinstance(score, Score)}
            per_photo = {stem: {name: by_photo[name].get(stem) for name in by_photo} for stem in predicted.captions}
            counts = {name: len(score.photos) for name, score in own.items() if isinstance(score, Score)}
            head = {"n": len(stems), "scored": counts, "idf": cfg.idf, "missing": cfg.missing, "versions": versions}
            results.append(head | {"corpus": corpus, "intervals": bounds, "photos": per_photo})
        one = len(runs) == 1
        named = [{"name": predicted.name} | result for predicted, result in zip(runs, results)]
        write_json(output, results[0] if one else {"runs": named, "paired": differences})
        compared = "" if one else f"; difference from {runs[0].name} on the same photos, p of a permutation test"
        print(f"{len(stems)} photos, CIDEr-D with idf {cfg.idf}; 95% bootstrap intervals over photos{compared}")
        print(text + (f"\n\n{extremes(runs[0], scores[0])}" if one else ""))
        print(f"\nscores of every photo: {output}")
        if cfg.page:
            columns = {name: LABELS[name] for name in results[0]["photos"][stems[0]] if name in scores[0]}
            write_scores_page(cfg.page, photos, references, runs, results, columns)
            print(f"page: {cfg.page}")
    if unavailable and any(scores):
        notice(unavailable)
    first = {name: getattr(score, "corpus", None) for name, score in scores[0].items()}
    print(f"CIDEr: {fixed_point(first.get('cider'))} | CLIPScore: {fixed_point(first.get('clipscore'))}")
    if not any(scores):
        raise NothingDone(unavailable or "none of the metrics could run")


if __name__ == "__main__":
    run(main, Config, ALIASES)
