"""CHAIR against figures counted by hand, and on real photos against captions that belong to other photos."""

import json
from pathlib import Path

import pytest

import p2_inference
from common.config import NothingDone, UserError
from data.annotations import read_annotations
from data.instances import read_instances
from data.predictions import read_predictions
from evaluate import Config, main
from metrics.chair import chair, object_finder
from metrics.object_words import NO_OBJECT
from metrics.table import LABELS, MEANINGS

KINDS = ["person", "dog", "cat", "hot dog", "pizza", "teddy bear", "bear", "train"]
PHOTOS = {  # objects in the photo, a reference, one caption and another
    "street": (["person", "dog"], "a man walks his dog", "A man, a dog and a cat; the dog barks.", "people with a dog"),
    "table": (["pizza"], "a hot dog beside a pizza", "Two hot dogs and a dog.", "a pizza"),
    "toys": (["teddy bear"], "a stuffed toy", "a teddy bear", "a couple of bears near the train tracks"),
    "sky": ([], "blue sky", "clouds", "clouds"),
}


@pytest.fixture
def scene(tmp_path) -> Path:
    images = [{"id": n, "file_name": f"{name}.png", "height": 4, "width": 4} for n, name in enumerate(PHOTOS)]
    categories = [{"id": n, "name": name} for n, name in enumerate(KINDS)]
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    objects = [
        {"image_id": n, "category_id": KINDS.index(kind), "segmentation": square}
        for n, (kinds, *_) in enumerate(PHOTOS.values())
        for kind in kinds
    ]
    captions = [{"image_id": n, "caption": text} for n, (_, text, *_) in enumerate(PHOTOS.values())]
    instances = {"images": images, "categories": categories, "annotations": objects}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "val.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for place, run in ((2, "one"), (3, "two")):
        (tmp_path / f"{run}.json").write_text(json.dumps({name: photo[place] for name, photo in PHOTOS.items()}))
    return tmp_path


def settings(scene: Path, *runs: str, **more) -> Config:
    runs, more = [scene / f"{run}.json" for run in runs], {"instances": scene / "instances.json"} | more
    return Config(runs, annotations=scene / "val.json", metrics=["chair"], **more)


def test_counted_by_hand(scene):
    """one: cat of (man, dog, cat); dog of (hot dog, dog); none of (teddy bear); no object: 2 of 4, 2 of 6.

    two: none of (people, dog), (pizza); bear of (bear); no object: 1 of 4, 1 of 4.
    """
    main(settings(scene, "one", "two"))
    scores = json.loads((scene / "scores.json").read_text())
    one, two = scores["runs"]
    assert (one["corpus"]["chair_s"], one["corpus"]["chair_i"]) == (2 / 4, pytest.approx(2 / 6))
    assert (two["corpus"]["chair_s"], two["corpus"]["chair_i"]) == (1 / 4, 1 / 4)
    assert one["photos"]["street"]["chair_i"] == pytest.approx(1 / 3) and one["photos"]["sky"]["chair_i"] is None
    assert [change["metric"] for change in scores["paired"]] == ["chair_s", "chair_i"]
    assert scores["paired"][1]["difference"] == pytest.approx(1 / 4 - 2 / 6)
    low, high = one["intervals"]["chair_i"]
    assert 0 <= low < 2 / 6 < high <= 1


def test_words_that_name_nothing_and_longest_phrases():
    find = object_finder(KINDS)
    assert find("a couple of  teddy  bears at the train station") == {"teddy bear"} and find("a dogma") == set()
    assert all(find(phrase) == set() for phrase in NO_OBJECT)
    with pytest.raises(NothingDone, match="no caption names an object"):
        chair({"a": ["a dog"]}, {"a": "nothing"}, type("Instances", (), {"categories": KINDS, "objects": {"a": {}}}))


def test_mistakes_are_one_line(scene):
    with pytest.raises(UserError, match="^instances: expected COCO's instances"):
        main(settings(scene, "one", instances=None))
    content = json.loads((scene / "instances.json").read_text())
    content["images"].pop()
    (scene / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances: .*instances.json does not know 1 photo \(sky\)"):
        main(settings(scene, "one"))


def test_every_score_has_a_name_and_a_meaning():
    assert LABELS.keys() == MEANINGS.keys() and all(len(text) > 10 for text in MEANINGS.values())


def test_the_shipped_captioner_names_less_that_is_not_there_than_shuffled_captions(real_data, tmp_path):
    coco, own = real_data / "coco-mini", tmp_path / "own.json"
    p2_inference.main(
        p2_inference.Config(
            Path("checkpoints/flickr8k"), coco / "images/train", own, device="cpu", limit=20, features=tmp_path / "none"
        )
    )
    captions = read_predictions(own)
    stems = list(captions)
    shuffled = {stem: captions[giver] for stem, giver in zip(stems, stems[1:] + stems[:1])}
    references = {photo.stem: list(photo.captions) for photo in read_annotations(coco / "train.json")}
    instances = read_instances(coco / "instances_train.json")
    right, wrong = (chair(references, run, instances) for run in (captions, shuffled))
    assert right["chair_i"].corpus < 0.6 < wrong["chair_i"].corpus
    assert right["chair_s"].corpus < wrong["chair_s"].corpus
