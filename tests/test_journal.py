"""Captioning that is stopped and goes on, and sampling that heeds the photo alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.config import NothingDone, UserError
from data.annotations import find_photos
from data.journal import Journal
from data.photos import PhotoBatches
from data.predictions import write_predictions
from models.decoder import causal_lm, fuse_lora
from models.decoding import Decoding, photo_seed

LIMIT = {"max_new_tokens": 10}
ODD = {1: " ", 2: "a cup on a cup on a cup on a table"}  # captions by the number of the photo


@pytest.fixture
def photos(tmp_path) -> list:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"p{number}.png")
    (folder / "p3.png").write_text("no photo")
    return find_photos(folder)


def caption_all(output: Path, photos: list, stop_after: int = 99, **settings) -> list:
    journal = Journal(output, {name: {"model": "m", "decoding": LIMIT} | settings for name in ("a", "b")})
    batches, seen = PhotoBatches(journal.missing(photos), 2, 1, "caption", len(journal.captions)), []
    for batch in batches:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append([loaded.stem for loaded in batch])
        red = [loaded.image.getpixel((0, 0))[0] for loaded in batch]
        captions = {
            "a": [[1] * (9 if value == 4 else 2) + [value] for value in red],
            "b": [[2, value] for value in red],
        }
        journal.append(batch, captions, lambda ids: f"{'red' if ids[0] == 1 else 'rouge'} {ids[-1]}")
    journal.finish(photos, batches.bad, {"device": "cpu"})
    return seen


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stopped_run_ends_as_an_unbroken_one(tmp_path, photos, stop_after):
    caption_all(tmp_path / "whole/x.json", photos)
    broken = tmp_path / "broken/x.json"
    with pytest.raises(KeyboardInterrupt):
        caption_all(broken, photos, stop_after)
    journal = broken.with_name("x.journal.jsonl")
    with journal.open("a") as file:
        file.write('["p6", "half a li')
    again = caption_all(broken, photos)
    assert sum(map(len, again)) == 6 - 2 * stop_after  # what was done is not done again
    for name in ("a", "b"):
        assert (tmp_path / f"whole/x.{name}.json").read_bytes() == (tmp_path / f"broken/x.{name}.json").read_bytes()
    assert not journal.exists()
    meta = json.loads((tmp_path / "broken/x.a.meta.json").read_text())
    assert meta.keys() == {"model", "decoding", "device", "seconds", "skipped", "form"}
    assert meta["form"] == {"empty": [], "cut": ["p4"], "repeating": []}  # known also where an earlier run wrote it
    assert meta["skipped"] == {"p3.png": "not a photo in a known format"}
    assert list(json.loads((tmp_path / "broken/x.a.json").read_text())) == ["p0", "p1", "p2", "p4", "p5", "p6"]


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_run_killed_between_its_outputs_is_finished_by_the_next(tmp_path, photos, monkeypatch, written):
    caption_all(tmp_path / "whole/x.json", photos)
    files = []

    def write(path, *rest):
        if written:
            write_predictions(path, *rest)
        files.append(path)
        if len(files) >= written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.journal.write_predictions", write)
        caption_all(tmp_path / "broken/x.json", photos)
    assert caption_all(tmp_path / "broken/x.json", photos) == []
    for name in ("a", "b"):
        assert (tmp_path / f"whole/x.{name}.json").read_bytes() == (tmp_path / f"broken/x.{name}.json").read_bytes()


def test_a_journal_of_other_settings_is_refused_by_name(tmp_path, photos):
    output = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        caption_all(output, photos, 1, seed=0)
    with pytest.raises(UserError, match="other settings, --overwrite begins anew: a.seed was 0, is 1; and 1 more"):
        caption_all(output, photos, seed=1)
    with pytest.raises(UserError, match=r"begins anew: decoding was \['a', 'b'\], is \['a'\]$"):
        Journal(output, {"a": {"model": "m", "decoding": LIMIT, "seed": 0}})
    begun = (tmp_path / "x.journal.jsonl").read_text()
    rows = ('["p0", {}]\n', '["p0", ["", null], {"a": [null, 0]}]\n')
    for lines in ("{}\nnot a caption\n", "[]\n", *(begun + row for row in rows)):
        (tmp_path / "x.journal.jsonl").write_text(lines)
        with pytest.raises(UserError, match="x.journal.jsonl is damaged; --overwrite begins anew"):
            caption_all(output, photos, seed=0)
    assert Journal(output, {"a": {}}, overwrite=True).captions == {}


def test_a_photo_that_was_replaced_is_captioned_anew(tmp_path, photos):
    with pytest.raises(KeyboardInterrupt):
        caption_all(tmp_path / "x.json", photos, 2)
    Image.new("RGB", (8, 8), (77, 0, 0)).save(photos[1].path)
    assert caption_all(tmp_path / "x.json", photos) == [["p1", "p5"], ["p6"]]
    captions = json.loads((tmp_path / "x.a.json").read_text())
    assert captions["p0"] == "red 0" and captions["p1"] == "red 77" and list(captions)[:2] == ["p0", "p1"]


def test_a_single_decoding_writes_the_output_itself_and_outputs_are_not_replaced(tmp_path, photos, capsys):
    output = tmp_path / "new" / "x.json"
    journal = Journal(output, {"best": {"model": "m", "decoding": LIMIT}})
    batches = PhotoBatches(journal.missing(photos), 4)
    for batch in batches:
        ids = [[int(loaded.stem[1:])] * (10 if loaded.stem in ("p2", "p6") else 9) for loaded in batch]
        journal.append(batch, {"best": ids}, lambda ids: ODD.get(ids[0], "a dog"))
    assert len(journal.captions) == 6 and [photo.stem for photo in journal.missing(photos)] == ["p3"]
    capsys.readouterr()
    journal.finish(photos, batches.bad, {})
    assert capsys.readouterr().out == f"6 captions in {output} (1 skipped, 1 empty, 2 cut, 1 repeating)\n"
    form = json.loads((tmp_path / "new/x.meta.json").read_text())["form"]
    assert form == {"empty": ["p1"], "cut": ["p2", "p6"], "repeating": ["p2"]}
    assert sorted(path.name for path in output.parent.glob("x*")) == ["x.json", "x.meta.json"]
    with pytest.raises(UserError, match="output: .*x.json exists; give another name, or --overwrite"):
        Journal(output, {"best": {"model": "m"}})
    Journal(output, {"best": {"model": "m"}}, overwrite=True)


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    for name in ("x" * 250 + ".json", "."):
        with pytest.raises((UserError, OSError), match="^output: |File name too long"):
            Journal(tmp_path / name, {"best": {}})
    (tmp_path / "y.journal.jsonl").mkdir()
    with pytest.raises(UserError, match="y.journal.jsonl is a folder"):
        Journal(tmp_path / "y.json", {"best": {}})


def test_two_runs_do_not_share_a_journal(tmp_path):
    code = "import sys; from pathlib import Path; from data.journal import Journal;"
    code += "j = Journal(Path(sys.argv[1]), {'a': {}});"
    command = [sys.executable, "-c", code + "print(flush=True); sys.stdin.read()", tmp_path / "x.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": "."}) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="^output: another run is writing .*x.json; wait for it"):
            Journal(tmp_path / "x.json", {"a": {}}, overwrite=True)
        other.kill()
    Journal(tmp_path / "x.json", {"a": {}})  # the lock of a process that was killed is no hindrance


def test_nothing_readable_is_nothing_done(tmp_path, photos):
    with pytest.raises(NothingDone, match="none of 1 photos"):
        caption_all(tmp_path / "x.json", photos[3:4])


def test_sampling_heeds_the_photo_alone(make_captioner, caption):
    """The same captions at any batch size and in any order; other seeds draw others."""
    captioner = make_captioner("gpt2").ready(torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    features = torch.randn(8, captioner.encoder.tokens, captioner.encoder.width)
    decoding = Decoding(max_new_tokens=8, do_sample=True, temperature=0.9, top_p=0.95, top_k=100)
    seeds = [photo_seed(0, f"photo {number}") for number in range(8)]
    together = caption(captioner, features, decoding, seeds)
    one_by_one = [caption(captioner, features[i : i + 1], decoding, seeds[i : i + 1])[0] for i in range(8)]
    assert together == one_by_one
    assert caption(captioner, features.flip(0), decoding, seeds[::-1]) == together[::-1]
    assert caption(captioner, features, decoding, [seed + 1 for seed in seeds]) != together


def test_sampling_draws_from_the_distribution():
    """10,000 rows of one distribution: frequencies within four standard errors."""
    from models.decoding import processors

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    process = processors(Decoding(do_sample=True), range(10_000), torch.zeros(10_000, 1), eos=0)
    drawn = process(None, logits.expand(10_000, -1)).argmax(1).bincount(minlength=4) / 10_000
    expected = logits.softmax(0)
    assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / 10_000).sqrt()).all()
    process = processors(Decoding(do_sample=True, top_k=2), range(10_000), torch.zeros(10_000, 1), eos=0)
    assert process(None, logits.flip(0).expand(10_000, -1)).argmax(1).unique().tolist() == [2, 3]  # never what is cut


def test_fused_lora_takes_float32_from_autocast_into_16_bits(make_captioner):
    """On CUDA autocast leaves layer norms in float32; the frozen weights behind them are bf16."""
    captioner = make_captioner("gpt2")
    for name, parameter in captioner.decoder.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    fuse_lora(captioner.decoder)
    layer = causal_lm(captioner.decoder).transformer.h[0].mlp.c_fc
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    layer(x).float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.lora_B["default"].weight.grad.abs().sum() > 0
