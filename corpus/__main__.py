"""Captions of a corpus too large for one process: Ray Data feeds actors on one machine or on a cluster.

    pip install --requirement requirements-ray.txt
    python -m corpus --checkpoint checkpoints/flickr8k --images SHARDS --output captions --actors 2
    python -m corpus --model llava-hf/llava-1.5-7b-hf --images corpus.parquet --output captions --precision bf16

The output is a folder of parts, which hold a row {key, caption, error} for each photo, in no fixed order. A photo that
cannot be decoded has its reason in `error` and no caption. A part is written whole or not at all; the same command,
given again, captions what no part holds. An actor that dies is replaced, and its part is done again. docs/scale.md says
what a million photos take.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from common.config import CommonSettings, UserError, changes, check, plain, run
from common.device import Precision, library_versions, pick_device, torch_dtype
from common.files import JsonLines, folder_problems, lock, read_text, remove_folder, write_json, written_whole
from data.annotations import find_photos
from data.photos import PHOTO_SUFFIXES, Photo, PhotoBatches, first_of
from models.checkpoint import check_checkpoint, find_checkpoint, load_captioner
from models.decoding import Decoding, check_decoding, photo_seed
from models.hub import means_folder
from models.vlm import PROMPT, load_vlm

SETTINGS = "settings.json"
MADE_WITH = ("checkpoint", "model", "prompt", "decoding", "form", "precision", "seed")  # a restart may not change them


@dataclass(frozen=True)
class Config(CommonSettings):
    """Settings of a captioning run over a corpus."""

    images: Path
    """A file or folder of Parquet or JSON lines (`key`, and `path` or `bytes`), of WebDataset's .tar, or of photos."""
    output: Path
    """Folder of parts to write."""
    checkpoint: Path | None = None
    """A run of p2_train.py, as in p2_inference.py; or else `model`."""
    model: str | None = None
    """A vision-language model of transformers, as in p1_llava_caption.py."""
    prompt: str = PROMPT
    """What such a model is asked."""
    decoding: Decoding = Decoding()
    """How a caption is chosen; greedy by default."""
    form: Literal["parquet", "jsonl"] = "parquet"
    """Form of the parts."""
    part_rows: PositiveInt = 1000
    """Photos in a part: what is lost at most when an actor dies."""
    actors: PositiveInt = 2
    """Processes that hold the model; each has a GPU of its own where there are GPUs."""
    batch_size: PositiveInt = 16
    """Photos captioned at a time."""
    precision: Precision = "float32"
    """float32 is exact; bf16 and fp16 are faster where the hardware multiplies them well."""


class PartCaptioner:
    """An actor: it loads the model once, then captions one part after another."""

    def __init__(self, cfg: Config):
        self.cfg, device, dtype = cfg, pick_device(cfg.device), torch_dtype(cfg.precision)
        if cfg.model:
            self.model = load_vlm(cfg.model, cfg.prompt, device, dtype)
        else:
            self.model = load_captioner(find_checkpoint(cfg.checkpoint)).ready(device, dtype)
        self.model.check_room(cfg.decoding.max_new_tokens, "decoding.max_new_tokens")

    def __call__(self, part):
        """Caption and write a part, given as a pandas frame; returns the keys of the photos without a caption."""
        from pandas import DataFrame

        cfg, rows = self.cfg, part.to_dict("records")
        root = cfg.images if cfg.images.is_dir() else cfg.images.parent  # of relative paths
        paths = [root / row["path"] if row.get("path") else None for row in rows]
        photos = [Photo(row["key"], path, content=row.get("bytes")) for row, path in zip(rows, paths)]
        captions, errors = self.caption(photos)
        frame = DataFrame({"key": part["key"], "caption": captions, "error": errors}, dtype="string")
        # a part that is done again has the same keys, so it takes the place of the first
        name = hashlib.blake2b("\n".join(part["key"]).encode(), digest_size=12).hexdigest()
        with written_whole(cfg.output / f"part-{name}.{cfg.form}") as file:
            frame.to_parquet(file) if cfg.form == "parquet" else frame.to_json(file, orient="records", lines=True)
        return frame[frame["caption"].isna()][["key"]]

    def caption(self, photos: list[Photo]) -> tuple[list[str | None], list[str | None]]:
        """Captions of N photos, and the reasons why some have none."""
        batches, captions = PhotoBatches(photos, self.cfg.batch_size), {}
        name = ["own"] if self.cfg.model else []  # p1_llava_caption.py draws by the name of the decoding too
        for batch in batches:
            seeds = {"own": [photo_seed(self.cfg.seed, *name, photo.stem) for photo in batch]}
            ids = self.model.generate(batch, {"own": self.cfg.decoding}, seeds)["own"]
            captions |= {photo.stem: self.model.text(caption) for photo, caption in zip(batch, ids)}
        reasons = {bad.path: bad.reason for bad in batches.bad}
        errors = [reasons.get(photo.path or Path(photo.stem)) for photo in photos]
        return [captions.get(photo.stem) for photo in photos], errors


def read_corpus(cfg: Config, data):
    """The photos as a dataset of `data` (ray.data), with `key` and `path` or `bytes`. Raises UserError."""
    files = sorted(cfg.images.iterdir()) if cfg.images.is_dir() else [cfg.images]
    kind = next((path.suffix for path in files if path.suffix in (".parquet", ".jsonl", ".tar")), None)
    paths = [str(path) for path in files if path.suffix == kind]
    if kind is None:
        return data.from_items([{"key": one.stem, "path": str(one.path.absolute())} for one in find_photos(cfg.images)])
    if kind == ".tar":
        return data.read_webdataset(paths, decoder=None).map(read_sample)
    corpus = data.read_parquet(paths) if kind == ".parquet" else data.read_json(paths, lines=True, file_extensions=None)
    names = corpus.schema().names
    if "key" not in names or not {"path", "bytes"} & set(names):
        raise UserError(f"images: {cfg.images}: expected columns key and path or bytes, got {', '.join(names)}")
    return corpus


def read_sample(sample: dict) -> dict:
    """The key and the photo of a sample of WebDataset; one without a photo is as one with an empty file."""
    names = (name for name in sample if f".{name.lower()}" in PHOTO_SUFFIXES)
    return {"key": sample["__key__"], "bytes": sample.get(next(names, ""), b"")}


def prepare(cfg: Config) -> None:
    """Check the settings, and keep the output folder for this run. Raises UserError."""
    problems = check_decoding("decoding", cfg.decoding)
    if cfg.model and means_folder(cfg.model) and not (Path(cfg.model) / "config.json").is_file():
        problems.append(f"model: {cfg.model}: expected a hub id or a model folder, found no config.json in it")
    if (cfg.checkpoint is None) == (cfg.model is None):
        problems.append("checkpoint: expected either checkpoint or model")
    check(problems + folder_problems(cfg.output, True, "", marker=SETTINGS))
    if cfg.checkpoint:
        check_checkpoint(find_checkpoint(cfg.checkpoint))
    lock(cfg.output)
    if cfg.overwrite:
        remove_folder(cfg.output)
    file, made_with = cfg.output / SETTINGS, {key: plain(cfg)[key] for key in MADE_WITH}
    changed = changes(json.loads(read_text(file)), made_with) if file.exists() else {}
    check([f"output: {cfg.output} was begun with another {key}: {change}" for key, change in changed.items()], shown=1)
    write_json(file, made_with | {"versions": library_versions()})


def main(cfg: Config) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from pandas import DataFrame, read_parquet
    except ImportError:
        raise UserError("ray is not installed; pip install --requirement requirements-ray.txt") from None
    prepare(cfg)
    finished: set[str] = set()
    for part in cfg.output.glob(f"part-*.{cfg.form}"):
        rows = read_parquet(part) if cfg.form == "parquet" else DataFrame(JsonLines(part).rows())
        finished |= set(rows["key"])
    alone = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": cfg.actors + 1, "include_dashboard": False}
    ray.init(log_to_driver=False, **alone)
    corpus, keys = read_corpus(cfg, ray.data), ray.put(list(finished))
    corpus = corpus.limit(cfg.limit) if cfg.limit else corpus

    def missing(rows):
        rows = rows.assign(key=rows["key"].astype(str))
        return rows[~rows["key"].isin(ray.get(keys))]

    # Ray joins small files to one block, and one actor would get them all
    corpus = corpus.map_batches(missing, batch_format="pandas").repartition(target_num_rows_per_block=cfg.part_rows)
    parts = corpus.map_batches(
        PartCaptioner, fn_constructor_args=(cfg,), batch_size=cfg.part_rows, batch_format="pandas", num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=cfg.actors),
        num_gpus=int("GPU" in ray.cluster_resources() and cfg.device != "cpu"),
    )  # fmt: skip
    failed = [row["key"] for row in parts.iter_rows()]
    print(f"{cfg.output}: {len(finished)} photos were done before, the rest is done now")
    if failed:
        print(f"{first_of(failed)} could not be decoded; the column error says why")


if __name__ == "__main__":
    run(main, Config)
