"""The drawn scenes are true and repeatable; the stand-in models load through the libraries that they stand in for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from common.config import UserError
from data.photos import Photo, load_photo
from demo import shapes, shuffle, standins, summary
from models.packing import pack_rows
from models.vlm import PROMPT, load_vlm

TRAIN, VAL = 60, 30
WHERE = {phrase: name for name, phrases in shapes.WORDS.items() for phrase in phrases}
CLAIM = re.compile(rf"(\w+ \w+) (?:is |lies )?({'|'.join(WHERE)}) (?:an?|the) (\w+ \w+)")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "shapes"
    shapes.main(shapes.Config(output=folder, train=TRAIN, val=VAL))
    return folder


def read(root: Path, split: str) -> tuple[dict[int, dict], dict[int, list[str]], dict[int, list[dict]]]:
    """Images by id, captions by image id, instances (with their category's name) by image id."""
    captions = json.loads((root / f"{split}.json").read_text())
    instances = json.loads((root / f"instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    images = {image["id"]: image for image in captions["images"]}
    texts = {i: [a["caption"] for a in captions["annotations"] if a["image_id"] == i] for i in images}
    things = {
        i: [a | {"name": names[a["category_id"]]} for a in instances["annotations"] if a["image_id"] == i]
        for i in images
    }
    return images, texts, things


def middle(box: list[float]) -> tuple[float, float]:
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- scenes


def test_same_seed_draws_the_same_files(root, tmp_path):
    shapes.main(shapes.Config(output=tmp_path / "again", train=TRAIN, val=VAL))
    shapes.main(shapes.Config(output=tmp_path / "other", train=TRAIN, val=VAL, seed=1))
    first, other = files(root), files(tmp_path / "other")
    assert files(tmp_path / "again") == first
    assert all(first[name] != other[name] for name in first if name.endswith(".png"))


def test_layout_and_ids(root):
    stems, ids = [], []
    for split, count in (("train", TRAIN), ("val", VAL)):
        images, texts, things = read(root, split)
        assert len(images) == count
        assert all((root / "images" / split / image["file_name"]).is_file() for image in images.values())
        assert all(len(set(five)) == 5 for five in texts.values())
        assert {len(found) for found in things.values()} == {1, 2, 3}
        stems += [Path(image["file_name"]).stem for image in images.values()]
        ids += images
    assert len(set(stems)) == len(set(ids)) == TRAIN + VAL


def test_captions_name_only_what_is_there(root):
    for split in ("train", "val"):
        _, texts, things = read(root, split)
        for i, five in texts.items():
            present = {tuple(thing["name"].split()) for thing in things[i]}
            assert set().union(*(shapes.named_pairs(text) for text in five)) <= present
            assert all(shapes.named_pairs(text) for text in five)


def test_directions_hold_between_boxes(root):
    claims = 0
    for split in ("train", "val"):
        _, texts, things = read(root, split)
        for i, five in texts.items():
            boxes = {thing["name"]: thing["bbox"] for thing in things[i]}
            for one, phrase, two in (claim for text in five for claim in CLAIM.findall(text)):
                (x1, y1), (x2, y2) = middle(boxes[one]), middle(boxes[two])
                right = {"left": x1 < x2, "right": x1 > x2, "above": y1 < y2, "below": y1 > y2}
                assert right[WHERE[phrase]], (one, phrase, two)
                claims += 1
    assert claims > TRAIN + VAL


def test_masks_and_boxes_lie_on_the_drawn_pixels(root):
    images, _, things = read(root, "train")
    for i, image in images.items():
        pixels = np.asarray(Image.open(root / "images" / "train" / image["file_name"])).astype(int)
        assert pixels.shape == (shapes.SIZE, shapes.SIZE, 3)
        masks = [run_lengths.decode(thing["segmentation"]).astype(bool) for thing in things[i]]
        assert np.sum(masks, axis=0).max() == 1, "things overlap"
        for thing, mask in zip(things[i], masks):
            colour = np.array(shapes.COLOURS[thing["name"].split()[0]])
            inside = np.abs(pixels - colour).max(axis=2) <= 10  # a thing's colour varies by 10 a channel
            rows, columns = np.nonzero(mask)
            assert thing["area"] == mask.sum() > 200
            assert thing["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert inside[mask].mean() > 0.8  # the rest is the smoothed edge


def test_background_is_no_things_colour():
    assert not set(shapes.COLOURS) & set(shapes.GROUNDS)


def test_pair_scores(root):
    images, _, things = read(root, "val")
    stems = {Path(image["file_name"]).stem: [thing["name"] for thing in things[i]] for i, image in images.items()}
    instances = root / "instances_val.json"
    all_named = {stem: "a " + " and a ".join(names) for stem, names in stems.items()}
    assert shapes.pair_scores(all_named, instances) == {"pairs_right": 1.0, "pairs_found": 1.0}

    stem, names = next((stem, names) for stem, names in stems.items() if len(names) == 2)
    absent = next(name for name in shapes.NAMES if name not in names)
    half = {stem: f"a {names[0].upper()} left of {absent}s, and again a {names[0]}"}
    assert shapes.pair_scores(half, instances) == {"pairs_right": 0.5, "pairs_found": 0.5}
    assert shapes.pair_scores({stem: "nothing at all"}, instances) == {"pairs_right": 0.0, "pairs_found": 0.0}
    with pytest.raises(UserError, match="no scene 'elsewhere'"):
        shapes.pair_scores({"elsewhere": "a red circle"}, instances)
    with pytest.raises(UserError, match="at least one"):
        shapes.pair_scores({}, instances)


# ------------------------------------------------------------------------------------------- outputs that are there


def test_drawn_folder_is_kept_refused_or_replaced(tmp_path, capsys):
    settings = {"output": tmp_path / "out", "train": 2, "val": 1}
    shapes.main(shapes.Config(**settings))
    first = files(tmp_path / "out")
    (tmp_path / "out" / "val.json").write_text("touched")
    shapes.main(shapes.Config(**settings))
    assert "already drawn" in capsys.readouterr().out
    assert (tmp_path / "out" / "val.json").read_text() == "touched"
    with pytest.raises(UserError, match="--overwrite"):
        shapes.main(shapes.Config(**settings | {"seed": 1}))
    shapes.main(shapes.Config(**settings, overwrite=True))
    assert files(tmp_path / "out") == first


def test_overwrite_never_removes_what_it_did_not_make(tmp_path):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(UserError, match="not made by this command"):
        shapes.main(shapes.Config(output=tmp_path, train=2, val=1, overwrite=True))
    assert (tmp_path / "letters").read_text() == "dear"


def test_work_that_fails_leaves_nothing(tmp_path):
    def fill(part: Path) -> None:
        (part / "half").write_text("written")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        shapes.make_folder(tmp_path / "out", {}, False, fill)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- stand-ins


def test_standins_load_and_are_kept(root, tmp_path, capsys):
    import open_clip
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = standins.Config(data=root, output=tmp_path, clip_steps=3, gpt2_steps=12, llava_steps=3)
    standins.main(settings)
    capsys.readouterr()
    made = files(tmp_path)
    standins.main(settings)
    assert files(tmp_path) == made and "CLIP:" not in capsys.readouterr().err

    clip = f"local-dir:{tmp_path / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    tokens = open_clip.get_tokenizer(clip)(["a red circle"])
    photo = preprocess(Image.open(root / "images" / "val" / "val_00000.png"))
    assert photo.shape == (3, 64, 64) and tokens.shape == (1, 32)
    stored = open_clip.factory.load_state_dict(str(tmp_path / "clip" / "open_clip_model.safetensors"))
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    patches = model.visual.forward_intermediates(photo[None], indices=1, intermediates_only=True, output_fmt="NLC")
    assert patches["image_intermediates"][0].shape == (1, 64, 128)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    caption = "a red circle to the left of an orange star"
    ids = tokenizer(caption)["input_ids"]
    assert tokenizer.decode(ids) == caption and len(ids) < len(caption) / 2
    assert tokenizer.eos_token == standins.EOS and decoder.config.vocab_size == len(tokenizer)
    packed = pack_rows([[ids]], tokenizer.eos_token_id)
    loss = torch.nn.functional.cross_entropy(decoder(input_ids=packed.input_ids).logits[0], packed.labels[0])
    assert loss < 0.9 * np.log(len(tokenizer)), "twelve steps beat a uniform guess"

    llava = load_vlm(str(tmp_path / "llava"), PROMPT, torch.device("cpu"), torch.float32)
    inputs = llava.inputs([load_photo(Photo("val_00000", root / "images" / "val" / "val_00000.png"))])
    assert (inputs["input_ids"] == llava.model.config.image_token_id).sum() == 64
    seen = llava.model.model.vision_tower(photo[None]).last_hidden_state[:, 1:]
    torch.testing.assert_close(seen, patches["image_intermediates"][0], atol=1e-5, rtol=0)
    assert (inputs["pixel_values"][0] - photo).abs().mean() < 0.05, "both libraries' transforms, up to their resampling"
    words = llava.tokenizer
    assert words.decode(words(caption)["input_ids"]) == caption and words.tokenize(caption)[0] == "\u2581a"


def test_equal_scenes_are_no_negatives():
    import torch

    logits = torch.tensor([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    one, two = frozenset({("red", "star")}), frozenset({("blue", "star")})
    apart = standins.contrastive_loss(logits, [one, one, two])
    assert apart < 1 < standins.contrastive_loss(logits, [one, two, frozenset()])


def test_missing_scenes_end_as_one_line(tmp_path):
    command = [sys.executable, "-m", "demo.standins", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train.json" in done.stderr and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- the control, the figures


def test_shuffled_captions_are_the_same_captions_and_none_is_at_its_place(tmp_path):
    captions = {f"scene{number}": f"caption {number}" for number in range(9)}
    (tmp_path / "val.json").write_text(json.dumps(captions))
    shuffle.main(shuffle.Config(tmp_path / "val.json", tmp_path / "shuffled.json"))
    shuffled = json.loads((tmp_path / "shuffled.json").read_text())
    assert list(shuffled) == list(captions) and sorted(shuffled.values()) == sorted(captions.values())
    assert not [stem for stem in captions if shuffled[stem] == captions[stem]]


def test_summary_takes_each_figure_from_its_file(tmp_path):
    def write(name: str, value: object) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))

    runs = [{"corpus": {"cider": score}} for score in (4, 1, 3, 2)]
    write("val.json", {})
    write("val.scores.json", {"runs": runs[:2]})
    write("scores.json", {"runs": runs[1:] + runs[:1]})
    settings = summary.Config(tmp_path, "rel", tmp_path / "summary.json")
    summary.main(settings)
    figures = {"cider": 4, "cider_shuffled": 1}
    figures |= {"cider_llava_best": 1, "cider_llava_moderate": 3, "cider_llava_diverse": 2}
    assert json.loads(settings.output.read_text()) == figures, "no scenes and no masks: no figures of them"
    rows = ("rel", "last_mean", "random weights, rel")
    scores = {row: {"match_at_1": {"score": n}, "pointing": {"score": 10 + n}} for n, row in enumerate(rows)}
    write("ground_ours/grounding.json", {"rows": scores})
    summary.main(settings)
    figures |= {"match_at_1": 0, "match_at_1_last_mean": 1, "match_at_1_random_weights": 2, "pointing": 10}
    assert json.loads(settings.output.read_text()) == figures
