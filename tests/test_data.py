"""The readers of photos, captions and predictions, on real data where it is at hand and on small files of each form."""

import csv
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from common.config import UserError
from data import photos as data_photos
from data.annotations import find_data, find_photos, read_annotations, read_splits
from data.features import FeatureCache, Features
from data.photos import BadPhoto, Photo, PhotoBatches, load_photo
from data.predictions import meta_path, read_predictions, write_predictions

CAPTIONS = {
    "b.jpg": ["A dog , wet , runs .", 'The sign says "stop" .'],
    "a.jpg": ["Zwei Hunde über dem Zaun 🐕", "two dogs"],
    "c.png": ["one cat"],
}


def coco(captions=CAPTIONS):
    return {
        "info": {"year": 2024},
        "images": [{"id": 10 * i, "file_name": name, "height": 3} for i, name in enumerate(captions)],
        "annotations": [
            {"id": 7, "image_id": 10 * i, "caption": one} for i, name in enumerate(captions) for one in captions[name]
        ],
    }


def karpathy(captions=CAPTIONS, splits=("train", "restval", "val")):
    return {
        "dataset": "coco",
        "images": [
            {"filename": name, "split": split, "sentences": [{"raw": one, "tokens": []} for one in captions[name]]}
            for name, split in zip(captions, splits)
        ],
    }


def token(captions=CAPTIONS):
    return "".join(f"{name}#{i}\t{one}\n" for name in captions for i, one in enumerate(captions[name]))


def table(captions=CAPTIONS, delimiter=",", header=("image", "caption")):
    file = io.StringIO()
    rows = [header] + [(name, one) for name in captions for one in captions[name]]
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue()


def records(captions=CAPTIONS):
    return [{"file_name": name, "caption": one} for name in captions for one in captions[name]]


FORMS = {
    "coco": lambda captions: json.dumps(coco(captions)),
    "karpathy": lambda captions: json.dumps(karpathy(captions), ensure_ascii=False, indent=1),
    "token": token,
    "csv": table,
    "tsv": lambda captions: table(captions, "\t"),
    "semicolons": lambda captions: table(captions, ";"),
    "columns of other names": lambda captions: table(captions, header=("file_name", "text")),
    "records": lambda captions: json.dumps(records(captions)),
    "records with lists": lambda captions: json.dumps(
        [{"id": 7, "image": name, "captions": captions[name]} for name in captions], indent=1
    ),
    "JSON lines": lambda captions: "\n".join(json.dumps(record) for record in records(captions)),
}


def save(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 6), "red").save(folder / name)
    return folder


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


# ------------------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mangle", [str, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_all_forms_give_the_same_photos_whatever_the_file_is_called(tmp_path, form, mangle):
    folder = draw(tmp_path / "photos", *CAPTIONS)
    file = save(tmp_path / "notes.dat", mangle(FORMS[form](CAPTIONS)).encode())
    expected = [Photo(Path(name).stem, folder / name, tuple(CAPTIONS[name])) for name in CAPTIONS]
    assert read_annotations(file, folder) == expected
    assert read_annotations(file, folder, limit=2) == expected[:2]
    assert [photo.path for photo in read_annotations(file)] == [None] * 3


names = st.lists(st.from_regex(r"[a-z]{1,8}\.jpg", fullmatch=True), min_size=1, max_size=4, unique=True)
texts = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
    .map(lambda text: " ".join(text.split()))
    .filter(bool),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(captions=names.flatmap(lambda keys: st.fixed_dictionaries({key: texts for key in keys})))
def test_any_caption_survives_every_form(tmp_path_factory, captions):
    file = tmp_path_factory.getbasetemp() / "any"
    expected = {Path(name).stem: tuple(captions[name]) for name in captions}
    for form in FORMS.values():
        if form is not FORMS["karpathy"] or len(captions) <= 3:  # the helper above names three splits
            save(file, form(captions))
            assert {photo.stem: photo.captions for photo in read_annotations(file)} == expected


def test_white_space_is_collapsed_and_photos_without_caption_are_left_out(tmp_path):
    data = coco({"a.jpg": ["  two\n dogs\t run "], "none.jpg": []})
    file = save(tmp_path / "a.json", data)
    assert read_annotations(file) == [Photo("a", None, ("two dogs run",))]
    draw(tmp_path / "images", "a.jpg")
    assert read_annotations(file)[0].path == tmp_path / "images/a.jpg"


def test_splits(tmp_path):
    dataset = save(tmp_path / "dataset.json", karpathy())
    assert [photo.stem for photo in read_annotations(dataset, split="train")] == ["b", "a"]
    assert [photo.stem for photo in read_annotations(dataset, split="restval")] == ["a"]
    assert [photo.stem for photo in read_annotations(dataset, split="dev")] == ["c"]
    assert [photo.stem for photo in read_annotations(dataset)] == ["b", "a", "c"]
    assert "its splits are restval, train, val" in error_of(read_annotations, dataset, split="tset")

    tokens = save(tmp_path / "tokens.txt", token())
    message = error_of(read_annotations, tokens, split="val")
    assert "'val'" in message and "Flickr_8k.devImages.txt" in message
    listed = save(tmp_path / "Flickr_8k.devImages.txt", "a.jpg\nb.jpg\n\n")
    for split in ("val", "dev", str(listed)):
        assert [photo.stem for photo in read_annotations(tokens, split=split)] == ["b", "a"]
    assert [photo.stem for photo in read_annotations(save(tmp_path / "c.txt", table()), split="dev")] == ["b", "a"]
    save(listed, "a.jpg\nzebra.jpg\n")
    assert "zebra.jpg has no caption" in error_of(read_annotations, tokens, split="dev")


def test_the_name_in_flickr8k_that_is_no_photo_is_left_out(tmp_path):
    file = save(tmp_path / "tokens.txt", "2258277193_586949ec62.jpg.1#0\tPeople wait .\n" + token())
    assert len(read_annotations(file, draw(tmp_path / "photos", *CAPTIONS))) == 3


def test_the_published_flickr30k_file(tmp_path):
    """Columns between bars, quotes that stand for themselves, and a row that lacks its second bar."""
    rows = [
        "image_name| comment_number| comment",
        'a.jpg| 0| The sign says "stop , or else .',
        "a.jpg| 1   A dog runs 4 miles .",
        "b.jpg| 0| Two cats , three dogs .",
    ]
    folder = draw(tmp_path / "flickr30k_images", "a.jpg", "b.jpg")
    photos = read_annotations(save(tmp_path / "results.csv", "\n".join(rows)))
    assert photos == [
        Photo("a", folder / "a.jpg", ('The sign says "stop , or else .', "A dog runs 4 miles .")),
        Photo("b", folder / "b.jpg", ("Two cats , three dogs .",)),
    ]
    assert "line 2: 4 columns, expected 3" in error_of(
        read_annotations, save(tmp_path / "x.csv", rows[0] + "\na.jpg| 0| one | two\n")
    )


def test_coco_files_whose_photos_have_ids_alone(tmp_path):
    data = {"images": [{"id": 391895}], "annotations": [{"image_id": 391895, "caption": "a dog"}]}
    assert read_annotations(save(tmp_path / "gt.json", data)) == [Photo("391895", None, ("a dog",))]


def test_splits_of_a_table_and_names_with_backslashes(tmp_path):
    file = save(tmp_path / "t.csv", "image,caption,split\nval2017\\a.jpg,a dog,val\nb.jpg,a cat,train\n")
    assert read_annotations(file, split="val") == [Photo("a", None, ("a dog",))]
    folder = draw(tmp_path / "images", "a.jpg", "b.jpg")
    assert [len(photos) for photos in read_splits(None, (file, folder), (None, folder))] == [1, 1]


def test_read_splits(tmp_path):
    folder = draw(tmp_path / "photos", *CAPTIONS)
    dataset = save(tmp_path / "dataset.json", karpathy())
    both = read_splits(None, (dataset, folder), (None, folder))
    assert [[photo.stem for photo in photos] for photos in both] == [["b", "a"], ["c"]]
    assert [len(photos) for photos in read_splits(None, (dataset, folder), (None, folder), (1, 1))] == [1, 1]
    plain = save(tmp_path / "plain.json", coco())
    assert [len(photos) for photos in read_splits(None, (plain, folder), (None, None))] == [3, 0]
    assert "images: expected the folder" in error_of(read_splits, None, (plain, None), (None, None))
    draw(tmp_path / "root/images", *CAPTIONS)
    save(tmp_path / "root/train.json", coco()), save(tmp_path / "root/val.json", coco({"c.png": ["one"]}))
    assert [len(photos) for photos in read_splits(tmp_path / "root", (None, None), (None, None))] == [3, 1]


def test_photos_are_found_beside_the_annotations(tmp_path):
    ours = save(tmp_path / "ours/val.json", coco())
    draw(tmp_path / "ours/images", "b.jpg")
    assert read_annotations(ours)[0].path is None  # not all of them
    draw(tmp_path / "ours/images/val", *CAPTIONS)
    assert read_annotations(ours)[0].path == tmp_path / "ours/images/val/b.jpg"

    as_coco = save(tmp_path / "coco/annotations/captions_val2017.json", coco())
    draw(tmp_path / "coco/val2017", *CAPTIONS)
    assert read_annotations(as_coco)[0].path == tmp_path / "coco/val2017/b.jpg"

    data = karpathy()
    for image in data["images"]:
        image["filepath"] = "val2014"
    draw(tmp_path / "k/images/val2014", *CAPTIONS)
    nested = save(tmp_path / "k/dataset.json", data)
    assert read_annotations(nested)[0].path == tmp_path / "k/images/val2014/b.jpg"
    assert read_annotations(nested, tmp_path / "ours/images/val")[0].path == tmp_path / "ours/images/val/b.jpg"


def edited(data: dict, edit) -> dict:
    edit(data)
    return data


BAD_ANNOTATIONS = {
    "empty": ("", ["empty", "CSV"]),
    "prose": ("Captions of my photos\n", ["not a known form", "Karpathy", "CSV"]),
    "not UTF-8": (b"\xff\xfe\x00a", ["UTF-8"]),
    "cut JSON": ('{"images": [', ["not JSON"]),
    "deep JSON": ("[" * 100_000, ["not JSON"]),
    "an object of other things": ({"n": 3, "idf": "subset"}, ["'n': caption of n is 3, not text"]),
    "a list": ([1], ["not a known form", "'images'"]),
    "images an object": ({"images": {"1": {}}}, ["the file: expected an object with images"]),
    "annotations null": ({"images": [], "annotations": None}, ["the file: expected an object with annotations"]),
    "no annotations": ({"images": []}, ["no photo with a caption"]),
    "instances": (
        edited(coco(), lambda data: [one.pop("caption") for one in data["annotations"]]),
        ["annotations[0]: no caption under caption, captions"],
    ),
    "no captions": ({"images": [], "annotations": []}, ["no photo with a caption"]),
    "missing key": (edited(coco(), lambda data: data["images"][1].pop("file_name")), ["images[1]", "file_name"]),
    "one caption missing": (
        edited(coco(), lambda data: data["annotations"][2].pop("caption")),
        ["annotations[2]", "caption"],
    ),
    "image no object": (edited(coco(), lambda data: data["images"].append("d.jpg")), ["images[3]", "object"]),
    "id a list": (
        edited(coco(), lambda data: data["images"][0].update(id=[1])),
        ["images[0]: expected an object with id, got"],
    ),
    "unknown id": (edited(coco(), lambda data: data["annotations"][3].update(image_id=99)), ["annotations[3]", "99"]),
    "repeated id": (edited(coco(), lambda data: data["images"][2].update(id=10)), ["images[2]", "10", "a.jpg"]),
    "caption a number": (
        edited(coco(), lambda data: data["annotations"][1].update(caption=3)),
        ["annotations[1]: caption of b.jpg is 3, not text"],
    ),
    "lone surrogate": (
        edited(coco(), lambda data: data["annotations"][1].update(caption="\ud83d dog")),
        ["annotations[1]", "surrogate pair"],
    ),
    "token line": (token() + "d.jpg two cats\n", ["line 6", "d.jpg two cats"]),
    "CSV comma": ("image,caption\na.jpg,a dog, wet\n", ["line 2", "3 columns"]),
    "CSV open quote": ('image,caption\na.jpg,"a dog\nb.jpg,a cat\n', ["line 3"]),
    "CSV stray quote": ('image,caption\na.jpg,"a dog" runs\n', ["line 2"]),
    "CSV no name": ("image,caption\n,a dog\n", ["line 2: expected an object with file_name", "got {'image': ''"]),
    "record without a caption": ([*records(), {"file_name": "d.jpg"}], ["records[5]: no caption under"]),
    "a cut line of JSON lines": ('{"image": "a.jpg", "text": "a"}\n{"image": "b.j', ["not JSON", "line 2"]),
}


@pytest.mark.parametrize("content, says", BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_bad_annotations_are_named_in_one_line(tmp_path, content, says):
    file = save(tmp_path / "bad.json", content)
    message = error_of(read_annotations, file)
    assert all(part in message for part in says), message
    assert str(file) in message or "stem" in message


CHAT = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "two dogs"}]
OTHER_FORMS = {
    "lists by name": {"a.jpg": ["two dogs"]},
    "records in an object": {"data": [{"image_id": 7, "image_path": "x/a.jpg", "caption_str": "two dogs"}]},
    "LLaVA": [{"id": "7", "image": "x/a.jpg", "conversations": CHAT}],
    "a conversation by roles": [
        {"image": "a.jpg", "conversations": [{"role": one["from"], "content": one["value"]} for one in CHAT]}
    ],
    "a column a caption": "filename,caption_0\na.jpg,two dogs\n",
    "an object of captions": {"a.jpg": "two dogs"},
    "Karpathy without splits": {"images": [{"filename": "a.jpg", "sentences": [{"raw": "two dogs"}]}]},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_that_people_have(tmp_path, form):
    photos = read_annotations(save(tmp_path / "captions", OTHER_FORMS[form]), draw(tmp_path / "photos", "a.jpg"))
    assert photos == [Photo("a", tmp_path / "photos/a.jpg", ("two dogs",))]


EMPTY = {
    "coco": edited(coco(), lambda data: data["annotations"][1].update(caption=" \n")),
    "null": edited(coco(), lambda data: data["annotations"][1].update(caption=None)),
    "token": "b.jpg#0\tA dog , wet , runs .\nb.jpg#1\t \n" + token({"a.jpg": CAPTIONS["a.jpg"], "c.png": ["one cat"]}),
    "list": [{"image": "b.jpg", "captions": ["A dog , wet , runs .", None]}, *records()[2:]],
    "no raw": edited(karpathy(), lambda data: data["images"][0]["sentences"][1].pop("raw")),
}


@pytest.mark.parametrize("content", EMPTY.values(), ids=EMPTY)
def test_captions_without_words_are_left_out_and_said(tmp_path, content, capsys):
    read = read_annotations(save(tmp_path / "a", content))
    assert [len(photo.captions) for photo in read] == [1, 2, 1]
    assert re.search(r"a: 1 captions left out: .*b.jpg has (an empty|null for) caption", capsys.readouterr().err)


def test_conversations_without_a_caption_are_left_out(tmp_path, capsys):
    asked = {"image": "b.jpg", "conversations": [{"from": "human", "value": "<image> What colour?"}, CHAT[1]]}
    text = {"id": "c", "conversations": [{"from": "human", "value": "Describe Rome."}, CHAT[1]]}
    file = save(tmp_path / "a.json", [asked, text, {"image": "a.jpg", "conversations": CHAT}])
    assert read_annotations(file) == [Photo("a", None, ("two dogs",))]
    assert "2 captions left out: records[0]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["IMG_2.JPG", "img_2.jpg", "IMG_2.png", "IMG_2", "val2017\\IMG_2.jpg", "/data/IMG_2.jpg"]
)
def test_names_that_only_one_photo_can_mean(tmp_path, name):
    folder = draw(tmp_path / "images", "IMG_2.jpg", "IMG_3.jpg")
    (photo,) = read_annotations(save(tmp_path / "a.json", coco({name: ["a dog"]})), folder)
    assert photo.path == folder / "IMG_2.jpg"
    draw(folder, "img_2.webp")
    if name not in ("val2017\\IMG_2.jpg", "/data/IMG_2.jpg"):  # the others may mean two photos now
        assert "it holds IMG_2.jpg, IMG_3.jpg" in error_of(read_annotations, tmp_path / "a.json", folder)


def test_composed_and_decomposed_names_and_the_prefix_of_coco(tmp_path):
    folder = draw(tmp_path / "images", "u\u0308ber.jpg", "COCO_val2014_000000000042.jpg")
    read = read_annotations(save(tmp_path / "a.json", coco({"\u00fcber.jpg": ["a"], "42.jpg": ["b"]})), folder)
    assert {photo.path.name for photo in read} == set(os.listdir(folder))


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    draw(tmp_path, "secret.jpg"), draw(tmp_path / "images", "a.jpg")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg"):
        file = save(tmp_path / "a.json", coco({name: ["a dog"]}))
        assert "secret.jpg) of" in error_of(read_annotations, file, tmp_path / "images")


def test_photos_that_were_never_downloaded_may_be_missing_where_that_was_said(tmp_path):
    file, folder = save(tmp_path / "a.json", coco()), draw(tmp_path / "images", "a.jpg", "c.png")
    assert "1 photo (b.jpg)" in error_of(read_annotations, file, folder)
    for images in (folder, None):
        read = read_annotations(file, images, missing=True)
        assert [photo.path.name for photo in read] == ["b.jpg", "a.jpg", "c.png"]
    batches = PhotoBatches(read, 8)
    assert [photo.stem for batch in batches for photo in batch] == ["a", "c"]
    assert [bad.reason for bad in batches.bad] == ["cannot be read (No such file or directory)"]
    assert "3 photos" in error_of(read_annotations, file, draw(tmp_path / "other"), missing=True)


def test_photos_of_one_stem_keep_their_whole_names(tmp_path):
    draw(tmp_path, "IMG_1.JPG", "IMG_1.PNG", "IMG_2.jpg")
    assert [photo.stem for photo in find_photos(tmp_path)] == ["IMG_1.JPG", "IMG_1.PNG", "IMG_2"]
    read = read_annotations(save(tmp_path / "a.json", coco({"IMG_1.JPG": ["one"], "IMG_1.PNG": ["two"]})))
    assert [(photo.stem, photo.path.name) for photo in read] == [("IMG_1.JPG", "IMG_1.JPG"), ("IMG_1.PNG", "IMG_1.PNG")]


def test_files_and_photos_that_are_not_there(tmp_path):
    assert "no such file" in error_of(read_annotations, tmp_path / "none.json")
    assert "directory" in error_of(read_annotations, tmp_path)
    file = save(tmp_path / "a.json", coco({f"{i}.jpg": ["dog"] for i in range(1200)}))
    assert "nowhere" in error_of(read_annotations, file, tmp_path / "nowhere")
    folder = draw(tmp_path / "photos", "0.jpg")
    message = error_of(read_annotations, file, folder)
    assert "1199 photos" in message and "1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg and 1194 more" in message
    assert read_annotations(file, folder, limit=1)[0].path == folder / "0.jpg"
    both = edited(coco(), lambda data: (data["annotations"][0].pop("caption"), data["images"][0].pop("id")))
    message = error_of(read_annotations, save(tmp_path / "b.json", both))
    assert "annotations[0]: image_id 0 is the id of no image" in message


def test_find_data(tmp_path):
    message = error_of(find_data, tmp_path, "train")
    assert "train.json" in message and "images" in message
    file, shared = save(tmp_path / "train.json", coco()), draw(tmp_path / "images")
    assert find_data(tmp_path, "train") == (file, shared)
    own = draw(shared / "train")
    assert find_data(tmp_path, "train") == (file, own)


# ------------------------------------------------------------------------------------------- photos to caption


def test_find_photos_in_a_folder_a_list_an_annotation_file_or_alone(tmp_path):
    folder = draw(tmp_path / "images", "b.jpg", "a.PNG", "c.png")
    save(folder / "notes.txt", "no photo")
    save(folder / "._b.jpg", b"\0")
    draw(folder / "below.jpg", "d.jpg")
    photos = [Photo("a", folder / "a.PNG"), Photo("b", folder / "b.jpg"), Photo("c", folder / "c.png")]
    assert find_photos(folder) == photos
    assert find_photos(folder, limit=2) == photos[:2]
    assert find_photos(folder / "b.jpg") == [photos[1]]
    assert find_photos(save(tmp_path / "list.txt", "images/b.jpg\r\n\n images/a.PNG\n")) == [photos[1], photos[0]]
    (folder / "a.PNG").rename(folder / "a.jpg")
    for number, form in enumerate(FORMS.values()):
        found = find_photos(save(tmp_path / f"captions{number}", form(CAPTIONS)))
        assert found == [Photo(Path(name).stem, folder / name) for name in CAPTIONS]
    uncaptioned = save(tmp_path / "image_info_test.json", {"images": coco()["images"]})
    assert [photo.stem for photo in find_photos(uncaptioned)] == ["b", "a", "c"]


def test_patterns_that_no_shell_expanded(tmp_path):
    for name in ("b.jpg", "a.jpg", "c1.jpg", "c[1].jpg", "d.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [photo.stem for photo in find_photos([tmp_path / "*.jpg"])] == ["a", "b", "c1", "c[1]"]
    assert [photo.stem for photo in find_photos([tmp_path / "c[1].jpg"])] == ["c[1]"]  # a name, and no pattern
    with pytest.raises(UserError, match="no such file or directory"):
        find_photos([tmp_path / "*.gif"])


def test_what_a_folder_holds_besides_photos_is_counted(tmp_path, capsys):
    draw(tmp_path, "a.jpg", "b.jpg")
    for name in ("c.txt", "d.txt", "e.dng", "f", ".hidden"):
        save(tmp_path / name, b"")
    draw(tmp_path / "below", "g.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.jpe")
    assert [photo.stem for photo in find_photos(tmp_path)] == ["a", "b"]
    others = "1 .dng, 1 .jpg, 2 .txt, 1 subfolder (--recursive enters it), 1 without suffix"
    assert capsys.readouterr().err == f"{tmp_path}: not read: {others}\n"


def test_subfolders_several_sources_and_lists(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "in", "a.jpg", "b.png"), draw(tmp_path / "in/deep/er", "a.jpg", "d.jpg")
    draw(tmp_path / "in/.thumbnails", "t.jpg")
    stems = [photo.stem for photo in find_photos(tmp_path / "in", recursive=True)]
    assert stems == ["a.jpg", "b", "deep/er/a.jpg", "d"] and capsys.readouterr().err == ""
    both = [tmp_path / "in/a.jpg", tmp_path / "in/deep/er", tmp_path / "in/a.jpg"]
    assert [photo.stem for photo in find_photos(both)] == ["a.jpg", "deep/er/a.jpg", "d"]
    monkeypatch.chdir(tmp_path)
    for line in ("in/deep/er/d.jpg", "in\\deep\\er\\d.jpg", "er\\d.jpg"):  # as seen from here or from the list
        listed = find_photos(save(tmp_path / "in/deep/list.txt", line + "\ngone.jpg\n"))
        assert [photo.stem for photo in listed] == ["d", "gone"] and load_photo(listed[0]).image


def test_photos_without_a_known_ending_are_told_by_their_content(tmp_path):
    for name in ("IMG_1", "b.jpg_large"):
        draw(tmp_path, "x.jpg"), (tmp_path / "x.jpg").rename(tmp_path / name)
    save(tmp_path / "BM.txt", "BM is a word"), save(tmp_path / "P1", "P1 1 1 1")
    assert [photo.stem for photo in find_photos(tmp_path)] == ["IMG_1", "b"]
    assert find_photos(tmp_path / "IMG_1") == [Photo("IMG_1", tmp_path / "IMG_1")]


def test_a_heic_photo_says_what_reads_it(tmp_path):
    file = save(tmp_path / "a.jpg", b"\0\0\0\x18ftypheic" + bytes(40))
    if "HEIF" not in data_photos.FORMATS:
        assert "pip install pillow-heif" in str(pytest.raises(BadPhoto, open_photo, file).value)
        return
    gradient().save(tmp_path / "b.heic", quality=95)
    assert difference(open_photo(tmp_path / "b.heic"), gradient()) < 5


def test_names_that_are_not_utf8_are_left_out(tmp_path, capsys):
    draw(tmp_path, "a.jpg")
    try:
        open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb").close()
    except OSError:  # macOS takes no such names
        return
    assert [photo.stem for photo in find_photos(tmp_path)] == ["a"]
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "I;16"])
def test_large_photos_are_shrunk_as_they_are_decoded(tmp_path, mode):
    """The shrunk photo is what the whole one becomes, but for a little."""
    small = gradient((800, 600)).convert("L" if mode == "I;16" else mode)
    file = tmp_path / ("a.jpg" if mode in ("RGB", "CMYK") else "a.png")
    large = small.resize((3600, 2700))
    if mode == "I;16":
        large = Image.fromarray(numpy.asarray(large).astype("uint16") * 257)
    large.save(file)
    image = open_photo(file)
    assert image.size == (1800, 1350)
    assert difference(image.resize((800, 600)), small.convert("RGB")) < 2


def test_large_photos_stay_upright_and_strips_are_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg", exif=exif)
    assert open_photo(tmp_path / "a.jpg").size == (1500, 2000)
    Image.new("L", (501, 1)).save(tmp_path / "strip.png")
    assert "501 x 1 pixels" in str(pytest.raises(BadPhoto, open_photo, tmp_path / "strip.png").value)
    Image.new("L", (60_000, 600)).save(tmp_path / "wide.png")
    assert open_photo(tmp_path / "wide.png").size == (60_000, 600)  # its short edge is short enough


def test_names_that_the_system_refuses_end_in_one_line(tmp_path):
    long, file = tmp_path / ("x" * 300), save(tmp_path / "a.json", coco())
    assert "name too long" in error_of(find_photos, long)
    assert "name too long" in error_of(read_annotations, long)
    assert "not a folder" in error_of(read_annotations, file, long)
    assert "no such folder" in error_of(find_data, long, "train")


def test_find_photos_says_what_is_wrong(tmp_path):
    empty = draw(tmp_path / "empty")
    assert "no photos" in error_of(find_photos, empty)
    assert "no photos" in error_of(find_photos, save(tmp_path / "empty.txt", "\n"))
    assert "no such file" in error_of(find_photos, tmp_path / "none.jpg")
    assert "UTF-8" in error_of(find_photos, save(tmp_path / "weights.bin", b"\xff\xfe\xfd"))
    message = error_of(find_photos, save(tmp_path / "prose.txt", "x" * 5000 + "\nb.jpg\n"))
    assert "2 photos" in message and "b.jpg) not there; expected one path a line" in message
    assert "a) not there; expected " in error_of(find_photos, save(tmp_path / "predictions.json", {"a": "a dog"}))
    assert "3 photos (" in error_of(find_photos, save(tmp_path / "apart/val.json", coco()))


def open_photo(path: Path) -> Image.Image:
    return load_photo(Photo(path.stem, path)).image


def gradient(size=(40, 30)) -> Image.Image:
    """Red grows to the right, green downwards: no two corners are alike."""
    x, y = numpy.meshgrid(numpy.linspace(0, 255, size[0]), numpy.linspace(0, 255, size[1]))
    return Image.fromarray(numpy.stack([x, y, 0 * x + 60], -1).astype("uint8"))


def difference(one: Image.Image, other: Image.Image) -> float:
    assert one.mode == other.mode == "RGB" and one.size == other.size
    return float(numpy.abs(numpy.asarray(one, float) - numpy.asarray(other, float)).mean())


UNDO = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation):
    stored = gradient().transpose(Image.Transpose[UNDO[orientation]]) if orientation > 1 else gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert difference(open_photo(tmp_path / "a.jpg"), gradient()) < 3


GREY = gradient().convert("L")
RAMP16 = numpy.tile(numpy.linspace(0, 65535, 40), (30, 1))
RAMP8 = Image.fromarray((RAMP16 / 257).round().astype("uint8")).convert("RGB")
HALF_CLEAR = Image.merge(
    "RGBA", [*gradient().split(), Image.fromarray(numpy.tile([[255] * 20 + [0] * 20], (30, 1)).astype("uint8"))]
)
ON_WHITE = gradient()
ON_WHITE.paste("white", (20, 0, 40, 30))
PALETTE = Image.new("P", (4, 2), 1)
PALETTE.putpalette([0, 0, 0, 255, 0, 0])
PALETTE.paste(0, (0, 0, 2, 2))

MODES = {
    "cmyk.jpg": (gradient().convert("CMYK"), {"quality": 95, "subsampling": 0}, gradient(), 3),
    "grey.jpg": (GREY, {"quality": 95}, GREY.convert("RGB"), 2),
    "grey16.png": (Image.fromarray(RAMP16.astype("uint16")), {}, RAMP8, 0.6),
    "grey16.tif": (Image.fromarray(RAMP16.astype("uint16")), {}, RAMP8, 0.6),
    "grey16.pgm": (Image.fromarray(RAMP16.astype("int32")), {}, RAMP8, 0.6),
    "grey32.tif": (Image.fromarray((RAMP16 * 30_000).astype("int32")), {}, RAMP8, 0.6),
    "float.tif": (Image.fromarray((RAMP16 / 65535).astype("float32")), {}, RAMP8, 0.6),
    "grey12.png": (Image.fromarray((RAMP16 / 16).astype("uint16")), {}, RAMP8, 0.6),
    "alpha.png": (HALF_CLEAR, {}, ON_WHITE, 0),
    "alpha.webp": (HALF_CLEAR, {"lossless": True, "exact": True}, ON_WHITE, 0),
    "grey_alpha.png": (HALF_CLEAR.convert("LA"), {}, None, 0),
    "bits.png": (GREY.convert("1"), {}, GREY.convert("1").convert("RGB"), 0),
    "palette.png": (PALETTE, {}, PALETTE.convert("RGB"), 0),
    "palette.bmp": (PALETTE, {}, PALETTE.convert("RGB"), 0),
    "clear_index.png": (PALETTE, {"transparency": 0}, "white left", 0),
    "clear_bytes.png": (PALETTE, {"transparency": b"\x00\xff"}, "white left", 0),
    "clear_index.gif": (PALETTE, {"transparency": 0}, "white left", 0),
    "clear_colour.png": (PALETTE.convert("RGB"), {"transparency": (0, 0, 0)}, "white left", 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(tmp_path, name):
    image, options, expected, tolerance = MODES[name]
    image.save(tmp_path / name, **options)
    if expected == "white left":
        expected = PALETTE.convert("RGB")
        expected.paste("white", (0, 0, 2, 2))
    elif expected is None:
        expected = GREY.convert("RGB")
        expected.paste("white", (20, 0, 40, 30))
    assert difference(open_photo(tmp_path / name), expected) <= tolerance


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_photo(tmp_path / "a.gif").getcolors() == [(64, (255, 0, 0))]


def cut_in_half(path: Path) -> None:
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_bad_photos_say_why(tmp_path):
    assert open_photo(draw(tmp_path, "good.jpg") / "good.jpg").size == (8, 6)
    save(tmp_path / "zero.jpg", b"")
    save(tmp_path / "text.jpg", "not a photo")
    cuts = [f"half{suffix}" for suffix in (".jpg", ".png", ".gif", ".tif", ".webp", ".bmp")]
    for name in cuts:
        cut_in_half(tmp_path / name)
    save(tmp_path / "page.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    reasons = {}
    for name in ["zero.jpg", "text.jpg", "page.jpg", "bomb.png", "none.jpg", ".", *cuts]:
        with pytest.raises(BadPhoto) as caught:
            open_photo(tmp_path / name)
        assert caught.value.path == tmp_path / name and str(tmp_path / name) in str(caught.value)
        reasons[name] = caught.value.reason
    assert reasons["zero.jpg"] == "empty file"
    assert reasons["text.jpg"] == reasons["page.jpg"] == "not a photo in a known format"
    assert all("cannot be read" in reasons[name] for name in [".", *cuts]) and "truncated" in reasons["half.jpg"]
    assert "exceeds limit of 220000000 pixels" in reasons["bomb.png"] and "No such file" in reasons["none.jpg"]


def test_a_large_photo_and_damaged_exif_are_read_without_a_warning(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")  # PIL warns from 89 million pixels on
    gradient().save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", quality=95, subsampling=0)
    code = (
        "import sys; from pathlib import Path; from data.photos import Photo, load_photo\n"
        "for name in sys.argv[1:]: print(load_photo(Photo(name, Path(name))).image.size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.png", tmp_path / "exif.jpg"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("(2000, 1800)\n(40, 30)\n", "")


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_keep_the_order_are_filled_and_look_a_little_ahead(tmp_path, monkeypatch, capsys, workers):
    for i in range(30):
        Image.new("L", (i + 1, 2)).save(tmp_path / f"{i:02}.png")
    save(tmp_path / "07.png", b"bad")
    photos = find_photos(tmp_path) + [Photo("unknown", None)]
    opened = []
    monkeypatch.setattr(data_photos, "load_photo", lambda photo, known: opened.append(photo) or load_photo(photo))
    batches, seen = PhotoBatches(photos, 4, workers), []
    for batch in batches:
        seen += batch
        assert len(opened) <= len(seen) + len(batches.bad) + 2 * workers
        assert len(batch) == 4 or len(seen) == 29
    assert [loaded.photo for loaded in seen] == [photo for photo in photos if photo.stem not in ("07", "unknown")]
    assert all(loaded.image.mode == "RGB" and loaded.image.width == int(loaded.stem) + 1 for loaded in seen)
    assert [str(bad.path) for bad in batches.bad] == [str(tmp_path / "07.png"), "unknown"]
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert skipped == [f"skipped {bad}" for bad in batches.bad]

    before = threading.active_count()
    stopped = iter(PhotoBatches(photos, 4, workers))
    next(stopped)
    stopped.close()
    assert threading.active_count() == before


def test_bad_photos_alone_make_no_batch(tmp_path):
    draw(tmp_path, "a.jpg")
    bad = [Photo("x", save(tmp_path / "x.jpg", b"no")), Photo("y", tmp_path / "none.jpg")]
    assert list(PhotoBatches(bad, 8)) == list(PhotoBatches([], 8)) == []
    ((only,),) = PhotoBatches([*bad, Photo("a", tmp_path / "a.jpg")], 8)
    assert only.stem == "a"


def test_a_photo_is_read_once_and_known_ones_are_not_decoded(tmp_path, monkeypatch):
    draw(tmp_path, "a.jpg", "b.jpg")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "c.jpg")
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or path.open("rb").read())
    a, b, c = (load_photo(photo) for photo in find_photos(tmp_path))
    assert read == ["a.jpg", "b.jpg", "c.jpg"] and a.image.size == (8, 6)
    assert a.key == b.key != c.key  # the key is of the bytes, not of the name
    ((*known, other),) = PhotoBatches(find_photos(tmp_path), 8, known=lambda key: key == a.key)
    assert [loaded.image for loaded in known] == [None, None] and other.image.size == (8, 6)


# ------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32])
def test_features_come_back_as_they_were_written(tmp_path, dtype):
    arrays = numpy.random.default_rng(0).normal(size=(4, 3, 5)).astype("float32")
    cache, keys = FeatureCache(tmp_path, "encoder", (3, 5), dtype), [f"{i}{i}key" for i in range(4)]
    cache.check_room(4)
    for key, array in zip(keys[:3], arrays):
        assert key not in cache and cache.read(key) is None
        cache.write(key, array)
    other_process = FeatureCache(tmp_path, "encoder", (3, 5), dtype)
    anew = dict(zip(keys, arrays))
    features = Features(other_process, keys[:3], anew.pop)
    assert features.keys == keys[:3] and keys[2] in other_process and keys[3] not in other_process
    assert features[[2, 0]].numpy().dtype == dtype
    numpy.testing.assert_array_equal(features[[2, 0]].numpy(), arrays[[2, 0]].astype(dtype))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [f"{key}.bin" for key in keys[:3]]
    for other in (FeatureCache(tmp_path, "another", (3, 5), dtype), FeatureCache(tmp_path, "encoder", (3, 4), dtype)):
        assert keys[0] not in other
    (tmp_path / "encoder/11/11key.bin").write_bytes(b"half a photo")  # as a full disk leaves files of other programs
    assert keys[1] not in cache and cache.read(keys[1]) is None
    assert len(anew) == 4
    numpy.testing.assert_array_equal(features[[0, 1]].numpy(), arrays[:2].astype(dtype))
    assert list(anew) == [keys[0], *keys[2:]]  # only what was lost was asked for


def test_features_that_cannot_be_kept_are_refused(tmp_path, monkeypatch):
    save(tmp_path / "file", "")
    cache = FeatureCache(tmp_path / "file", "encoder", (3, 5))
    with pytest.raises(OSError, match="Not a directory: .*file/encoder"):
        cache.check_room(1)
    message = error_of(FeatureCache(tmp_path / "new", "encoder", (257, 1024)).check_room, 10**12)
    assert "needs 526340000.0 GB for 1000000000000 photos" in message and "GB are free" in message


def fill(folder: Path) -> None:
    cache = FeatureCache(folder, "encoder", (16, 8))
    cache.check_room(50)
    for i in range(50):
        cache.write(f"{i:03}", numpy.full((16, 8), i))


def test_many_processes_fill_one_cache(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    features = Features(FeatureCache(tmp_path, "encoder", (16, 8)), [f"{i:03}" for i in range(50)], {}.pop)
    assert (features[range(50)].numpy() == numpy.arange(50)[:, None, None]).all()
    assert not list(tmp_path.rglob("*.part"))


# ------------------------------------------------------------------------------------------- predictions


def test_predictions_come_back_in_order_with_their_account(tmp_path):
    path = tmp_path / "new" / "greedy.v2.json"
    captions = {"b": "a dog 🐕", "a": "", "é": 'says "hi"\n'}
    write_predictions(path, captions, {"model": "tiny", "seconds": 1.5})
    assert list(read_predictions(path).items()) == list(captions.items())
    assert meta_path(path) == tmp_path / "new" / "greedy.v2.meta.json"
    assert json.loads(meta_path(path).read_text(encoding="utf-8")) == {"model": "tiny", "seconds": 1.5}
    assert sorted(os.listdir(path.parent)) == ["greedy.v2.json", "greedy.v2.meta.json"]
    assert meta_path(Path("out")) == Path("out.meta.json")


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"a": "one"', ["not JSON"]),
        ("a: one", ["not a known form; expected ", "a JSON object {photo: caption or captions}"]),
        (b"\xff", ["UTF-8"]),
        ("[1]", ["not a known form", "a JSON object"]),
        ('{"a": ["1", "3"], "b": "2", "c": ["4", "4"]}', ["'a' has 2 captions", "'c' has 2"]),
        ('{"a": "1", "b": 2, "c": ["x", "y"]}', ["'b': caption of b is 2, not text"]),
        ('[{"image_id": 7, "caption": "x"}, {"image_id": 7, "caption": "x"}]', ["'7' has 2 captions"]),
        ('{"a": ["x", "y"]}', ["'a' has 2 captions"]),
        ('[{"image_id": 7, "score": 3}]', ["records[0]: no caption"]),
        ("image,caption\na,x,y\n", ["line 2: 3 columns"]),
        (r'{"a": "1", "b": "\ud83d dog"}', ["'b'", "surrogate"]),
        (r'{"a": "1", "\udcff": "dog"}', [r"'\udcff'", "surrogate"]),
    ],
)
def test_bad_predictions_are_named(tmp_path, content, says):
    file = save(tmp_path / "p.json", content)
    message = error_of(read_predictions, file)
    assert all(part in message for part in [*says, str(file)]), message
    message.encode()


PREDICTIONS = {
    "COCO's results": [{"image_id": 7, "caption": "a dog"}, {"image_id": 8, "caption": ""}],
    "wrapped": {"model": "x", "results": [{"image_id": 7, "caption": "a dog"}, {"image_id": 8, "caption": ""}]},
    "JSON lines": '{"image_id": 7, "caption": "a dog"}\n{"image_id": 8, "caption": ""}\n',
    "by name": {"7": "a dog", "8": ""},
    "in lists": {"7": ["a dog"], "8": [""]},
    "a table": "image,caption\n7,a dog\n8,\n",
    "with a null": {"7": "a dog", "8": "", "9": None},
}


@pytest.mark.parametrize("content", PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions_as_other_scorers_write_them(tmp_path, content):
    assert read_predictions(save(tmp_path / "p", content)) == {"7": "a dog", "8": ""}


def test_predictions_that_are_not_there(tmp_path):
    assert "no such file" in error_of(read_predictions, tmp_path / "none.json")


# ------------------------------------------------------------------------------------------- real data

REAL = Path(os.environ.get("CAPTION_DATA", ""))
real = pytest.mark.skipif("CAPTION_DATA" not in os.environ, reason="CAPTION_DATA is not set")


@real
@pytest.mark.parametrize(
    "data, split, photos, captions",
    [("flickr8k", "train", 6000, 30_000), ("flickr8k", "val", 1000, 5000), ("coco-mini", "train", 80, 400)],
)
def test_real_data_reads_whole(data, split, photos, captions):
    read = read_annotations(*find_data(REAL / data, split))
    assert (len(read), sum(len(photo.captions) for photo in read)) == (photos, captions)
    assert all(photo.path.is_file() for photo in read)
    assert read == read_annotations(REAL / data / f"{split}.json")  # the photos are found beside the file
    assert {photo.path for photo in find_photos(REAL / data / "images" / split)} == {photo.path for photo in read}


@real
def test_real_photos_open_and_instances_serve_as_a_list_only(tmp_path):
    instances = REAL / "coco-mini/instances_train.json"
    assert "no caption under" in error_of(read_annotations, instances)
    photos = find_photos(instances)
    assert len(photos) == 80
    sizes = {
        Path(image["file_name"]).stem: (image["width"], image["height"])
        for image in json.loads(instances.read_text())["images"]
    }
    for batch in PhotoBatches(photos, batch_size=32):
        for loaded in batch:
            assert loaded.image.mode == "RGB" and loaded.image.size == sizes[loaded.stem]


@real
def test_real_captions_read_alike_in_the_forms_of_flickr8k(tmp_path):
    read = read_annotations(REAL / "flickr8k/val.json")
    captions = {photo.path.name: list(photo.captions) for photo in read}
    for form in (token, table):
        again = read_annotations(save(tmp_path / "captions.txt", form(captions)), REAL / "flickr8k/images/val")
        assert again == read


def test_a_full_disk_is_enough_for_features_that_are_stored(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, "encoder", (3, 5))
    for key in ("aa1", "bb2"):
        cache.write(key, numpy.zeros((3, 5)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    cache.check_room(2)
    assert "for 1 photos" in error_of(cache.check_room, 3)
