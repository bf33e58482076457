"""Every family of vision-language models: captions as plain `generate` writes them, attention as it saw it, boxes."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, HEATMAPS, build
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

import p1_llava_caption
import p3_visualize
from common.config import UserError
from data.predictions import read_predictions
from models.attention import EXTRAS
from models.decoding import CACHE, Decoding
from models.patch_boxes import grid_of, image_embeddings
from models.vlm import COMPARED, PLACED, PROMPT, VisionLanguageModel

SIZES = [(120, 90), (60, 110), (200, 70)]
TOKENS = 12


@pytest.fixture(scope="module")
def photos(as_photos):
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in SIZES]
    return as_photos([image.resize(size) for image, size in zip(coarse, SIZES)])


@cache
def of(name: str) -> VisionLanguageModel:
    if name == "smolvlm":
        pytest.importorskip("num2words")  # its processor asks for it
    return VisionLanguageModel(*build(name), PROMPT)


def plain_inputs(vlm: VisionLanguageModel, image: Image.Image) -> dict:
    """What the library's own way makes of one photo and the prompt."""
    if vlm.processor.chat_template is None:
        inputs = vlm.processor(images=[[image]], text=[PROMPT], return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]
        inputs = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
    return {name: value for name, value in inputs.items() if name != "labels"}


@torch.inference_mode()
def plain(vlm: VisionLanguageModel, image: Image.Image, **settings) -> list[int]:
    """Ids of the caption by plain `generate`, up to the end token."""
    inputs = plain_inputs(vlm, image)
    out = vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **settings)[0].tolist()
    new = out[inputs["input_ids"].shape[1] :]
    return new[: new.index(2)] if 2 in new else new


@pytest.mark.parametrize("name", FAMILIES)
def test_captions_are_those_of_plain_generate(name, photos):
    vlm = of(name)
    expected = {beams: [plain(vlm, photo.image, num_beams=beams) for photo in photos] for beams in (1, 2)}
    if name == "internvl" and CACHE != "cache":  # older releases of transformers mix up the tiles of beams
        expected[2] = vlm.generate(photos, {"": Decoding(TOKENS, num_beams=2)}, {"": ()})[""]
    assert len(set(map(tuple, expected[1]))) > 1
    decodings = {
        "greedy": Decoding(TOKENS), "sampled": Decoding(TOKENS, do_sample=True), "beams": Decoding(TOKENS, num_beams=2)
    }  # fmt: skip
    seeds = {decoding: range(len(photos)) for decoding in decodings}
    together = vlm.generate(photos, decodings, seeds)
    assert (together["greedy"], together["beams"]) == (expected[1], expected[2])
    for number, photo in enumerate(photos):
        alone = vlm.generate([photo], decodings, dict.fromkeys(decodings, [number]))
        assert [alone[decoding][0] for decoding in decodings] == [together[decoding][number] for decoding in decodings]


# ------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", HEATMAPS)
def test_records_are_what_generation_saw_in_eager_attention(name, photos):
    vlm = of(name)
    captions = vlm.generate(photos, {"": Decoding(5)}, {"": ()})[""]
    image = vlm.model.config.image_token_id
    words = [caption[: caption.index(image)] if image in caption else caption for caption in captions]
    records = vlm.attend(photos, [[caption, caption[:2]] for caption in words], EXTRAS)
    for photo, caption, (record, _) in zip(photos, words, records):  # gradients do not heed the other photos either
        ((alone, _),) = vlm.attend([photo], [[caption, caption[:2]]], EXTRAS)
        for extra in EXTRAS:
            values = alone.extra[extra]
            np.testing.assert_allclose(record.extra[extra], values, rtol=1e-3, atol=1e-5 * np.abs(values).max())
            assert values.std(axis=-1).max() > 0, extra
    vlm.attend(photos[:1], [[[image, image]]], EXTRAS)  # a caption may hold the image's token
    vlm.model.set_attn_implementation("eager")
    for photo, own in zip(photos, records):
        inputs = plain_inputs(vlm, photo.image)
        length = inputs["input_ids"].shape[1]
        seen = {"output_attentions": True, "output_logits": True, "return_dict_in_generate": True}
        with torch.inference_mode():
            out = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False, **seen)
        image = (inputs["input_ids"][0] == vlm.model.config.image_token_id).nonzero()[:, 0]
        share = grid_of(vlm.patch_boxes(*photo.image.size))[1]
        assert share.shape[0] == len(image)
        for record in own:
            for step in range(min(len(record.ids), len(out.attentions))):
                # a layer with a sliding window keeps its last keys only
                layers = [
                    F.pad(layer[0, :, -1], (length + step - layer.shape[-1], 0)) for layer in out.attentions[step]
                ]
                attention = torch.stack(layers)[..., image].numpy()  # (L, H, N)
                np.testing.assert_allclose(record.mean[:, step], attention.mean(axis=1) @ share, atol=1e-5)
                np.testing.assert_allclose(record.peak[:, step], attention[-2:].max(axis=1) @ share, atol=1e-5)
                np.testing.assert_allclose(record.extra["heads"][:, :, step], attention @ share, atol=1e-5)
                chance = out.logits[step][0].softmax(dim=-1)[record.ids[step]]
                assert record.probabilities[step] == pytest.approx(float(chance), abs=1e-5)
    vlm.model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "sdpa"})


# ------------------------------------------------------------------------------------------- boxes


def grid(box, rows: int, columns: int) -> list[tuple]:
    """Boxes that divide `box`, row by row."""
    (x, y), wide, tall = box[:2], (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
    return [
        (x + j * wide, y + i * tall, x + (j + 1) * wide, y + (i + 1) * tall)
        for i in range(rows)
        for j in range(columns)
    ]


def tiles(width: int, height: int, rows: int, columns: int) -> list[tuple]:
    """Tiles of 2 x 2 tokens, and the whole photo last."""
    return [box for tile in grid((0, 0, width, height), rows, columns) for box in grid(tile, 2, 2)]


def anyres(width: int, height: int) -> list[tuple]:
    """LLaVA-NeXT (Liu et al. 2024): the whole photo, then tiles without their padding, a token behind each row."""
    tall, wide = select_best_resolution((height, width), [[h, w] for h in (56, 112, 168) for w in (56, 112, 168)])
    scale = min(wide / width, tall / height)
    shown = [math.ceil(side * scale - 1e-9) for side in (width, height)]  # px of the photo on the tiles
    left, top = (wide - shown[0]) // 2, (tall - shown[1]) // 2
    rows, columns, cut_rows, cut_columns = tall // 14, wide // 14, 0, 0
    if width / height > columns / rows:
        cut_rows = (rows - int(round(height * columns / width, 7))) // 2
    else:
        cut_columns = (columns - int(round(width * rows / height, 7))) // 2
    boxes = grid((0, 0, width, height), 4, 4)
    for row in range(cut_rows, rows - cut_rows):
        for column in range(cut_columns, columns - cut_columns):
            edges = (14 * column - left, 14 * row - top, 14 * column + 14 - left, 14 * row + 14 - top)
            boxes.append(tuple(edge * (width, height)[k % 2] / shown[k % 2] for k, edge in enumerate(edges)))
        boxes.append((np.nan,) * 4)
    return boxes


def derived(name: str, vlm: VisionLanguageModel, inputs: dict, width: int, height: int) -> np.ndarray:
    """(N, 4) boxes by the rules that the family's processor follows."""
    whole = (0, 0, width, height)
    if name == "llava":
        resized = [int(56 * side / min(width, height)) for side in (width, height)]
        corner = [(side - 56) // 2 for side in resized]
        edges = np.array([*corner, *(start + 56 for start in corner)]) * ([width, height] * 2) / (resized * 2)
        boxes = grid(edges, 4, 4)
    elif name in ("llava_next", "llava_onevision"):
        boxes = anyres(width, height)
    elif name in ("idefics3", "smolvlm"):
        _, rows, columns = vlm.processor.image_processor.get_number_of_image_patches(height, width)
        boxes = tiles(width, height, rows, columns) + grid(whole, 2, 2)
    elif name == "internvl":
        columns, rows = get_optimal_tiled_canvas((height, width), (56, 56), 1, 6)
        boxes = tiles(width, height, rows, columns) + grid(whole, 2, 2) * (rows * columns > 1)
    elif "image_grid_thw" in inputs:
        boxes = grid(whole, *(inputs["image_grid_thw"][0, 1:] // 2).tolist())
    elif "image_sizes" in inputs:
        boxes = grid(whole, *(inputs["image_sizes"][0] // (28 if name == "mistral3" else 14)).tolist())
    else:
        boxes = grid(whole, 4, 4)
    return np.array(boxes).clip(0, [width, height] * 2)


def overlap(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Intersection over union of pairs of boxes."""
    inside = (np.minimum(one[:, 2:], two[:, 2:]) - np.maximum(one[:, :2], two[:, :2])).clip(min=0).prod(axis=1)
    return inside / ((one[:, 2:] - one[:, :2]).prod(axis=1) + (two[:, 2:] - two[:, :2]).prod(axis=1) - inside)


@pytest.mark.parametrize("name", HEATMAPS)
def test_boxes_are_those_of_the_processors_rules_and_painting_changes_their_tokens_most(name, as_photos):
    vlm, rng = of(name), np.random.default_rng(0)
    for width, height in ((120, 90), (97, 211)):
        photo = Image.fromarray(rng.integers(100, 150, (height, width, 3), dtype=np.uint8))
        inputs, boxes = vlm.inputs(as_photos([photo])), vlm.patch_boxes(width, height)
        expected = derived(name, vlm, inputs, width, height)
        assert np.array_equal(np.isnan(expected), np.isnan(boxes))
        real = ~np.isnan(boxes[:, 0])
        found = overlap(boxes[real], expected[real])
        assert found.mean() > 0.96 and found.min() > 0.85
        cells, share = grid_of(boxes)
        assert np.allclose(share[real].sum(axis=1), 1) and not share[~real].any()
        with torch.inference_mode():
            before = image_embeddings(vlm.model, inputs)
            left, top, right, bottom = cells.box
            for row, column in rng.integers(0, (cells.rows, cells.columns), (4, 2)):
                x = left + (right - left) * np.array([column, column + 1]) / cells.columns
                y = top + (bottom - top) * np.array([row, row + 1]) / cells.rows
                painted = photo.copy()
                painted.paste((255, 0, 255), (round(x[0]), round(y[0]), round(x[1]), round(y[1])))
                change = (image_embeddings(vlm.model, vlm.inputs(as_photos([painted]))) - before).norm(dim=1).numpy()
                holds = share[:, row * cells.columns + column] > 0.05
                assert change[holds].mean() > 1.5 * change[~holds].mean(), (width, height, row, column)


# ------------------------------------------------------------------------------------------- padding to a square


def test_padded_photos_are_seen_whole_and_the_padding_is_no_part_of_a_map(photos):
    vlm = VisionLanguageModel(*build("llava"), PROMPT, fit="pad")
    boxes = vlm.patch_boxes(200, 100)  # 4 x 4 patches on a square of 200 px: the first and last rows see padding
    assert np.isnan(boxes[[0, 1, 2, 3, 12, 13, 14, 15]]).all()
    assert overlap(boxes[4:12], np.array(grid((0, 0, 200, 100), 2, 4))).min() > 0.95
    cells = vlm.patch_grid(200, 100)
    assert (cells.rows, cells.columns) == (2, 4) and np.allclose(cells.box, (0, 0, 200, 100), atol=0.5)
    image = photos[0].image  # 120 x 90 px
    square = Image.new("RGB", (120, 120), tuple(int(255 * x) for x in vlm.processor.image_processor.image_mean))
    square.paste(image, (0, 15))
    caption = plain(vlm, square)
    assert vlm.generate(photos[:1], {"": Decoding(TOKENS)}, {"": ()})[""] == [caption] != [plain(vlm, image)]
    ((record,),) = vlm.attend(photos[:1], [[caption]])
    cells, share = grid_of(vlm.patch_boxes(*image.size))  # the first and the last row of patches see half of it
    assert record.mean.shape[2] == cells.rows * cells.columns == 16
    assert np.allclose(share[4].reshape(4, 4)[:, 0], (0.25, 0.75, 0, 0), atol=0.03)
    assert record.mean.sum(axis=2).max() < 1


@pytest.mark.parametrize("name", ["qwen3_vl", "mistral3"])
def test_a_thin_photo_ends_no_run(name, as_photos):
    """Qwen's processors refuse a photo that is 200 times as long as wide, Pixtral's one that loses its last pixel."""
    vlm, photos = of(name), as_photos([Image.new("RGB", (400, 1), "red")])
    (caption,) = vlm.generate(photos, {"": Decoding(3)}, {"": ()})[""]
    ((record,),) = vlm.attend(photos, [[caption]])
    boxes = vlm.patch_boxes(400, 1)
    assert np.isfinite(record.mean).all() and np.nanmin(boxes) >= 0 and np.nanmax(boxes[:, 3]) <= 1


# ------------------------------------------------------------------------------------------- what is not supported


@pytest.mark.parametrize("name, said", [
    ("blip2", "model: blip-2 reads the photos anew for each decoding\n"),
    ("paligemma2", "model: paligemma reads the photos anew for each decoding\n"),
    ("vipllava", "model: vipllava reads the photos anew for each decoding, and its captions were never compared"),
])  # fmt: skip
def test_other_families_are_captioned_and_said_and_have_no_heatmaps(name, said, photos, tmp_path, monkeypatch, capsys):
    model, processor = build(name)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    photos[0].image.save(tmp_path / "photo.png")
    given = {"images": tmp_path / "photo.png", "model": str(tmp_path / "model"), "device": "cpu"}
    p1_llava_caption.main(
        p1_llava_caption.Config(output=tmp_path / "x.json", decoding=["best", "diverse"], fit="pad", **given)
    )
    assert capsys.readouterr().err.count(said) == 1
    assert len(read_predictions(tmp_path / "x.best.json")) == 1
    assert json.loads((tmp_path / "x.best.meta.json").read_text())["fit"] == "pad"
    monkeypatch.setattr("models.vlm.load_whole", lambda *_, **__: pytest.fail("weights were read first"))
    with pytest.raises(
        UserError, match=f"model: heatmaps need one of the families gemma3, .*this is {model.config.model_type}"
    ):
        p3_visualize.main(p3_visualize.Config(output=tmp_path / "maps", **given))


def test_every_family_that_is_called_compared_is_compared_here():
    found = {name: build(name)[0].config.model_type for name in FAMILIES if name != "smolvlm"} | {"smolvlm": "smolvlm"}
    assert set(found.values()) == {*COMPARED, "vipllava"} and {found[name] for name in HEATMAPS} == set(PLACED)
