"""A corpus on Ray Data: every form in and out, broken photos, a second start. Skipped where Ray is not installed."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import p2_inference
from common.config import UserError
from corpus import __main__ as caption_corpus
from data.photos import Photo, load_photo
from models.checkpoint import save_captioner

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(data_root, tmp_path) -> Path:
    """A folder of eight photos and one that cannot be decoded."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in (data_root / "images" / "train").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "void.png").write_text("no photo")
    return folder


def write_corpus(form: str, photos: Path, folder: Path) -> Path:
    """The photos in two files of one form."""
    import pandas

    folder.mkdir()
    paths = sorted(photos.iterdir())
    for number, own in enumerate((paths[:5], paths[5:])):
        file = folder / f"{number}{form}"
        if form == ".tar":
            with tarfile.open(file, "w") as tar:
                for path in own:
                    for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.txt", b"a text")):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        elif form == ".parquet":
            columns = {"key": [path.stem for path in own], "bytes": [path.read_bytes() for path in own]}
            pandas.DataFrame(columns).to_parquet(file)
        else:
            rows = [{"key": path.stem, "path": os.path.relpath(path, folder)} for path in own]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "form, output", [("", "jsonl"), (".tar", "parquet"), (".parquet", "jsonl"), (".jsonl", "parquet")]
)
def test_captions_are_those_of_the_script_and_a_second_start_does_the_rest(
    form, output, photos, make_captioner, tmp_path
):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("ray")
    save_captioner(make_captioner("gpt2"), tmp_path / "captioner")
    p2_inference.main(p2_inference.Config(tmp_path / "captioner", photos, tmp_path / "plain.json", device="cpu"))
    corpus = write_corpus(form, photos, tmp_path / "corpus") if form else photos
    flags = f"--checkpoint {tmp_path}/captioner --images {corpus} --output {tmp_path}/captions --form {output}"
    flags += " --device cpu --actors 1 --part_rows 2 --batch_size 2"
    starts = ["--limit 3", ""] if form == ".tar" else [""]  # a start of Ray takes long, so one restart is enough
    for limit in starts:
        command = [sys.executable, "-m", "corpus", *flags.split(), *limit.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert f"{3 * (len(starts) - 1)} photos were done before, the rest is done now\n1 photo (void)" in done.stdout
    read = pandas.read_parquet if output == "parquet" else lambda path: pandas.read_json(path, lines=True)
    rows = pandas.concat([read(path) for path in (tmp_path / "captions").glob("part-*")]).to_dict("records")
    assert len(rows) == 9
    captions = {row["key"]: row["caption"] for row in rows if isinstance(row["caption"], str)}
    assert captions == json.loads((tmp_path / "plain.json").read_text()) and len(captions) == 8
    assert {row["key"]: row["error"] for row in rows if isinstance(row["error"], str)} == {
        "void": "not a photo in a known format"
    }


def test_a_photo_is_read_from_its_bytes(photos):
    path = photos / "train0.png"
    from_bytes = load_photo(Photo("train0", None, content=path.read_bytes()))
    from_file = load_photo(Photo("train0", path))
    assert from_bytes.image.tobytes() == from_file.image.tobytes() and from_bytes.key == from_file.key
    Image.new("RGB", (2, 2)).save(file := io.BytesIO(), "PNG")
    sample = {"__key__": "a/b", "txt": b"a text", "PNG": file.getvalue()}
    assert caption_corpus.read_sample(sample) == {"key": "a/b", "bytes": file.getvalue()}
    assert caption_corpus.read_sample({"__key__": "c"}) == {"key": "c", "bytes": b""}


def test_mistakes_are_refused_before_ray_starts(photos, make_captioner, tmp_path):
    save_captioner(make_captioner("gpt2"), tmp_path / "captioner")
    for settings, message in (
        ({}, "checkpoint: expected either checkpoint or model"),
        ({"checkpoint": photos}, "found no captioner.json in it"),
        ({"model": str(photos)}, "found no config.json in it"),
        ({"checkpoint": tmp_path / "captioner", "output": photos}, "holds something other than a run"),
    ):
        cfg = caption_corpus.Config(**({"images": photos, "output": tmp_path / "captions"} | settings))
        with pytest.raises(UserError, match=message):
            caption_corpus.prepare(cfg)
        assert not (tmp_path / "captions").exists()
    cfg = caption_corpus.Config(photos, tmp_path / "captions", tmp_path / "captioner")
    caption_corpus.prepare(cfg)
    with pytest.raises(UserError, match="was begun with another seed: was 0, is 1"):
        caption_corpus.prepare(caption_corpus.Config(photos, cfg.output, cfg.checkpoint, seed=1))
