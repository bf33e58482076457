"""Attention records against eager attention with `output_attentions`, and their maps, words and grounding scores."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import UserError
from metrics.grounding import METRICS, GroundingTable, Named, auroc, cover_on_grid, find_named, ground
from metrics.statistics import interval
from models.attention import EXTRAS, AttentionRecord, record_attention
from models.attribution import METHODS, Unit, against_others, joined, smoothed, split_units
from models.decoder import causal_lm
from models.decoding import Decoding
from models.vlm import PROMPT, load_vlm

IDS = [[5, 9, 13, 7, 11], [14], [8, 8, 12]]
CPU = torch.device("cpu")


def made_up(ids: list[int], mean: np.ndarray, lens: np.ndarray | None = None, **extra: np.ndarray) -> AttentionRecord:
    """A record of given attention (L, T, P) and logits (T, P)."""
    lens = mean[0] if lens is None else lens
    shares, text = np.ones((len(mean), len(ids), 3)), np.ones((len(ids),) * 2)
    return AttentionRecord(ids, np.ones(len(ids)), mean, mean[-2:], shares, lens, text, extra)


@pytest.fixture(params=["ours", "vlm"])
def model(request, make_captioner, llava_folder):
    """Either kind of model, ready for inference."""
    if request.param == "ours":
        return make_captioner("gpt2").ready(CPU, torch.float32)
    return load_vlm(str(llava_folder), PROMPT, CPU, torch.float32)


@pytest.fixture(params=["gpt2", "llama", "gpt2 start", "llama start"])
def seen(request, make_captioner):
    """A captioner with LoRA, the features of three photos, and the records of three captions of different lengths."""
    name, _, start = request.param.partition(" ")
    captioner = make_captioner(name).ready(CPU, torch.float32)
    decoder = dataclasses.replace(captioner.config.decoder, start_token=bool(start))
    captioner.config = dataclasses.replace(captioner.config, decoder=decoder)
    torch.manual_seed(0)
    features = torch.randn(3, captioner.encoder.tokens, captioner.encoder.width)
    captioner.encode = lambda photos: features[list(photos)]
    return captioner, features, [record for (record,) in captioner.attend(range(3), [[ids] for ids in IDS])]


@torch.no_grad()
def test_records_of_our_captioner_are_what_eager_attention_sees(seen):
    captioner, features, records = seen
    lm, eos = causal_lm(captioner.decoder), captioner.tokenizer.eos_token_id
    assert lm.config._attn_implementation == "sdpa"
    lm.set_attn_implementation("eager")
    patches = captioner.encoder.tokens - 1  # the class token is no patch
    first = 1 + captioner.config.decoder.start_token
    for one, ids, record in zip(features, IDS, records):
        image = captioner.prefix(one[None])
        words = lm.get_input_embeddings()(torch.tensor([[eos, *ids]]))
        out = lm(inputs_embeds=torch.cat([image, words], dim=1), output_attentions=True, output_hidden_states=True)
        attention = torch.stack(out.attentions)[:, 0, :, image.shape[1] :, first : first + patches]  # (L, H, T, P)
        assert attention.shape[2:] == (len(ids) + 1, patches) and record.ids == [*ids, eos]
        np.testing.assert_allclose(record.mean, attention.mean(dim=1), atol=1e-5)
        np.testing.assert_allclose(record.peak, attention[-2:].amax(dim=1), atol=1e-5)
        every = torch.stack(out.attentions)[:, 0, :, image.shape[1] :].mean(dim=1)  # (L, T, K)
        shares = [every[..., first : first + patches], every[..., image.shape[1] :], every[..., :1]]
        np.testing.assert_allclose(record.shares, torch.stack([one.sum(dim=2) for one in shares], dim=2), atol=1e-5)
        text = lm.get_output_embeddings()(out.hidden_states[-1])[0, image.shape[1] :][:, record.ids].T
        np.testing.assert_allclose(record.text, text, atol=1e-4)
        chances = out.logits[0, image.shape[1] :].softmax(dim=-1)[range(len(record.ids)), record.ids]
        np.testing.assert_allclose(record.probabilities, chances, atol=1e-5)
        lens = lm.get_output_embeddings()(out.hidden_states[-1])[0, first : first + patches][:, record.ids].T
        np.testing.assert_allclose(record.lens, lens, atol=1e-4)


@torch.no_grad()
def test_it_sees_what_generation_saw(seen):
    captioner, features, _ = seen
    lm = causal_lm(captioner.decoder)
    (ids,) = captioner.generate([0], {"caption": Decoding(max_new_tokens=6)}, {"caption": ()})["caption"]
    ((record,),) = captioner.attend([0], [[ids]])
    lm.set_attn_implementation("eager")
    image = captioner.prefix(features[:1])
    first = lm.get_input_embeddings()(torch.tensor([[captioner.tokenizer.eos_token_id]]))
    out = lm.generate(
        inputs_embeds=torch.cat([image, first], dim=1), max_new_tokens=6, do_sample=False, output_attentions=True,
        return_dict_in_generate=True, pad_token_id=captioner.tokenizer.eos_token_id,
        attention_mask=torch.ones(1, image.shape[1] + 1, dtype=torch.long),
    )  # fmt: skip
    for place, step in enumerate(out.attentions[: len(record.ids)]):
        own = torch.stack(step)[:, 0, :, -1, image.shape[1] - 16 : image.shape[1]].mean(dim=1)  # (L, P)
        np.testing.assert_allclose(record.mean[:, place], own, atol=1e-5)


@torch.no_grad()
def test_records_of_llava_are_what_eager_attention_sees(llava_folder, as_photos):
    llava = load_vlm(str(llava_folder), PROMPT, CPU, torch.float32)
    rng = np.random.default_rng(0)
    photos = as_photos([Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in IDS])
    records = [record for (record,) in llava.attend(photos, [[ids] for ids in IDS])]
    assert llava.model.config.text_config._attn_implementation == "sdpa"
    llava.model.set_attn_implementation("eager")
    for photo, ids, record in zip(photos, IDS, records):
        inputs = llava.inputs([photo])
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        out = llava.model(**inputs, output_attentions=True)
        columns = (inputs["input_ids"][0] == llava.model.config.image_token_id).nonzero()[:, 0]
        attention = torch.stack(out.attentions)[:, 0, :, length - 1 :][..., columns]
        assert attention.shape[2:] == (len(ids) + 1, 576)
        np.testing.assert_allclose(record.mean, attention.mean(dim=1), atol=1e-5)
        chances = out.logits[0, length - 1 :].softmax(dim=-1)[range(len(record.ids)), record.ids]
        np.testing.assert_allclose(record.probabilities, chances, atol=1e-5)


@torch.no_grad()
def test_left_padding_and_no_mass_on_the_future():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, initializer_range=0.3, **shape)).eval()
    ids, mask = torch.randint(40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    rows, every = torch.tensor([[5, 8], [6, 7]]), torch.arange(9).expand(2, -1)
    with record_attention(lm, rows, every) as recorder:
        lm(input_ids=ids, attention_mask=mask, position_ids=positions)
    lm.set_attn_implementation("eager")
    out = lm(input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True)
    for layer, own in zip(out.attentions, recorder.mean):
        expected = layer.mean(dim=1)[torch.arange(2)[:, None], rows]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(own.sum(dim=2), torch.ones(2, 2))
        assert own[every[:, None, :].expand_as(own) > rows[:, :, None]].abs().max() == 0
        assert own[1, :, :4].abs().max() == 0  # nor on padding
    with record_attention(lm, rows, every[:, 6:]) as recorder:
        lm(input_ids=ids, attention_mask=mask, position_ids=positions)
    for layer, shares in zip(out.attentions, recorder.shares):
        expected = layer.mean(dim=1)[torch.arange(2)[:, None], rows]
        torch.testing.assert_close(shares[..., 2], torch.stack([expected[0, :, 0], expected[1, :, 4]]))  # first token


def test_attention_that_passes_by_is_an_error_and_the_model_is_left_as_it_was(make_captioner, monkeypatch):
    lm = causal_lm(make_captioner("llama").decoder)
    with pytest.raises(ZeroDivisionError), record_attention(lm, torch.zeros(1, 1).long(), torch.zeros(1, 1).long()):
        assert lm.config._attn_implementation == "recorded"
        raise ZeroDivisionError
    assert lm.config._attn_implementation == "sdpa"
    monkeypatch.setattr(type(lm), "set_attn_implementation", lambda *_: None)  # sdpa runs on, and returns no attention
    with pytest.raises(UserError, match="cannot be recorded"):
        with record_attention(lm, torch.zeros(1, 1).long(), torch.zeros(1, 1).long()):
            assert lm(input_ids=torch.tensor([[1]]), output_attentions=True).logits is not None


def test_several_captions_of_a_photo_are_as_each_alone_and_encoded_once(model, as_photos, monkeypatch):
    photos = as_photos([Image.effect_noise((64, 48), 80).convert("RGB") for _ in range(2)])
    model.patch_grid(64, 48)  # measured once for each size of photo
    tower = model.encoder.net if hasattr(model, "encoder") else model.model.model.vision_tower
    encoded = []
    tower.register_forward_pre_hook(lambda _, args, kwargs: encoded.append(1), with_kwargs=True)
    encode = type(model.encoder).forward if hasattr(model, "encoder") else None
    if encode:  # its network is not called as a module
        monkeypatch.setattr(type(model.encoder), "forward", lambda *args: encoded.append(1) or encode(*args))
    if encode:  # a photo that was captioned is not encoded again to be looked into
        model.generate(photos, {"caption": Decoding(max_new_tokens=3)}, {"caption": ()})
    together = model.attend(photos, [IDS, IDS[1:]])
    assert len(encoded) == 1 and [len(records) for records in together] == [3, 2]
    for photo, records, captions in zip(photos, together, [IDS, IDS[1:]]):
        for record, ids in zip(records, captions):
            ((alone,),) = model.attend([photo], [[ids]])
            for name in ("mean", "peak", "probabilities"):
                np.testing.assert_allclose(getattr(record, name), getattr(alone, name), atol=1e-5)
            np.testing.assert_allclose(record.lens, alone.lens, atol=1e-4)
            assert record.ids == alone.ids


def test_random_weights_have_learnt_nothing(model, as_photos):
    photos = as_photos([Image.effect_noise((64, 48), 80).convert("RGB")])
    ((before,),) = model.attend(photos, [[[6, 7]]])
    model.randomize()
    ((after,),) = model.attend(photos, [[[6, 7]]])
    assert np.isfinite(after.mean).all() and np.abs(after.lens - before.lens).max() > 0.01


def by_hand(lm, embeddings, rows, columns, ids) -> dict[str, np.ndarray]:
    """The methods of EXTRAS, each by its paper's formula and plain autograd over eager attention, a token a pass."""
    lm.set_attn_implementation("eager")
    layer_inputs = []
    layers = lm.base_model.h if hasattr(lm.base_model, "h") else lm.base_model.layers
    keep = layers[-1].register_forward_pre_hook(lambda _, args: layer_inputs.append(args[0]))
    found = {name: [] for name in EXTRAS}
    for row, token in zip(rows, ids):
        with torch.enable_grad():
            out = lm(inputs_embeds=embeddings.detach().requires_grad_(), output_attentions=True)
            logit = out.logits[0, row, token]
            *grads, of_input = torch.autograd.grad(logit, [*out.attentions, layer_inputs[-1]])
        eye = np.eye(embeddings.shape[1])
        rollout, relevancy = eye, eye
        for attention, grad in zip(out.attentions, grads):
            attention, grad = attention[0].detach().double().numpy(), grad[0].double().numpy()
            rollout = (attention.mean(axis=0) + eye) @ rollout
            relevancy = relevancy + np.maximum(attention * grad, 0).mean(axis=0) @ relevancy
        found["heads"].append(torch.stack(out.attentions)[:, 0, :, row, columns].detach())
        found["rollout"].append(rollout[row, columns])
        found["relevancy"].append(relevancy[row, columns])
        states, weights = layer_inputs[-1][0, columns].detach(), of_input[0, columns].mean(dim=0)
        found["gradcam"].append(states @ weights)
    keep.remove()
    lm.set_attn_implementation("sdpa")
    return {name: np.stack(maps, axis=-2) for name, maps in found.items()}


def agree(records: list[AttentionRecord], expected: list[dict[str, np.ndarray]]) -> None:
    for record, by_name in zip(records, expected):
        for name in EXTRAS:
            np.testing.assert_allclose(record.extra[name], by_name[name], rtol=1e-4, atol=1e-6)
            assert by_name[name].std(axis=-1).min() > 0, name


def test_what_costs_more_is_what_its_papers_compute(seen):
    """For captions packed behind one prefix, and for three photos at a time."""
    captioner, features, _ = seen
    lm, eos = causal_lm(captioner.decoder), captioner.tokenizer.eos_token_id
    with torch.no_grad():
        image = captioner.prefix(features)
        columns = np.arange(image.shape[1] - captioner.encoder.tokens + 1, image.shape[1])
        expected = []
        for one, ids in ((0, IDS[0]), (0, IDS[2]), (1, IDS[1])):
            words = lm.get_input_embeddings()(torch.tensor([[eos, *ids]]))
            rows = range(image.shape[1], image.shape[1] + len(ids) + 1)
            whole = torch.cat([image[one : one + 1], words], dim=1)
            expected.append(by_hand(lm, whole, rows, columns, [*ids, eos]))
    first, second = captioner.attend([0, 1], [[IDS[0], IDS[2]], [IDS[1]]], EXTRAS)
    agree([*first, *second], expected)
    for extra in ((), ("gradcam",), ("rollout", "heads")):  # what was not asked for is not made
        ((record,),) = captioner.attend([0], [[IDS[1]]], extra)
        assert set(record.extra) == set(extra)


def test_what_costs_more_of_llava(llava_folder, as_photos):
    llava = load_vlm(str(llava_folder), PROMPT, CPU, torch.float32)
    photos = as_photos([Image.effect_noise((480, 400), 80).convert("RGB") for _ in range(2)])
    first, second = llava.attend(photos, [[IDS[0], IDS[1]], [IDS[2]]], EXTRAS)
    expected, lm = [], torch.nn.Module()
    for photo, ids in ((0, IDS[0]), (0, IDS[1]), (1, IDS[2])):
        inputs = llava.inputs([photos[photo]])
        length, columns = inputs["input_ids"].shape[1], (inputs["input_ids"][0] == llava.model.config.image_token_id)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kept = {}
        hook = lambda _, __, call: kept.update(call)  # noqa: B023, E731
        with torch.no_grad():
            keep = llava.model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
            llava.model(**inputs)
            keep.remove()
        lm = Headed(llava.model.model.language_model, llava.model.get_output_embeddings())
        rows = range(length - 1, length + len(ids))
        closed = [*ids, llava.tokenizer.eos_token_id]
        expected.append(by_hand(lm, kept["inputs_embeds"], rows, columns.nonzero()[:, 0].numpy(), closed))
    agree([*first, *second], expected)
    ((cheap,), _) = llava.attend(photos, [[IDS[0]], [IDS[2]]])
    for name in ("mean", "peak", "shares", "lens", "text"):  # the pass without a cache sees the same
        np.testing.assert_allclose(getattr(first[0], name), getattr(cheap, name), atol=1e-4)


class Headed(torch.nn.Module):
    """A language model and its head, called as one."""

    def __init__(self, base_model, head):
        super().__init__()
        self.base_model, self.head = base_model, head
        self.set_attn_implementation = base_model.set_attn_implementation

    def forward(self, **call):
        out = self.base_model(**call)
        out["logits"] = self.head(out.last_hidden_state)
        return out


# ------------------------------------------------------------------------------------------- words and maps


def test_sub_words_are_joined_to_words(model, as_photos):
    text = "a red unheard-of box, a box . it's"
    ids = model.ids(text)
    ((record,),) = model.attend(as_photos([Image.effect_noise((64, 64), 80).convert("RGB")]), [[ids]], EXTRAS)
    words = split_units(record, model.tokenizer)
    assert [word.text for word in words] == ["a", "red", "unheard", "-of", "box", ",", "a", "box", ".", "it's"]
    assert sorted(place for word in words for place in word.tokens) == list(range(len(ids)))
    assert words[2].probability == pytest.approx(np.prod(record.probabilities[list(words[2].tokens)]))
    assert all(word.shares.shape == (2, 3) and 0 < word.shares[:, 0].mean() <= 1 for word in words)
    grid = (int(record.mean.shape[2] ** 0.5),) * 2
    for method in METHODS.values():
        maps = method.maps(record, words, grid)
        assert maps.shape == (len(words), record.mean.shape[2]) and np.isfinite(maps).all()
        alone = method.maps(record, words[:1], grid)
        assert np.isfinite(alone).all()
    (pieces,) = [list(word.tokens) for word in words if word.text == "unheard"]
    assert len(pieces) > 1
    assert np.array_equal(joined(record.mean, words)[:, 2], record.mean[:, pieces].max(axis=1))


def test_an_id_that_the_tokenizer_does_not_have_is_a_word_without_text(model, as_photos):
    """Models often have more ids than their tokenizers, as room for more."""
    ids = [*model.ids("a red box"), len(model.tokenizer) + 1]
    record = made_up(ids, np.ones((2, len(ids), 4)))
    assert [unit.text for unit in split_units(record, model.tokenizer)] == ["a", "red", "box"]


def test_a_sink_hides_nothing_from_rel():
    """Planted: one patch takes 90% of every word's attention; the word's own patch gets twice what others give it."""
    maps = np.full((4, 64), 0.001)
    maps[:, 0] = 0.9
    for word in range(4):
        maps[word, 10 + 9 * word] = 0.01
    assert (maps.argmax(axis=1) == 0).all()
    assert against_others(maps).argmax(axis=1).tolist() == [10, 19, 28, 37]
    flat = smoothed(np.ones((2, 12)), (3, 4))
    assert np.allclose(flat, 1)
    one = np.zeros((1, 25))
    one[0, 12] = 16
    assert smoothed(one, (5, 5)).reshape(5, 5)[1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


def test_fuse_gives_attention_and_logits_the_same_weight(model):
    rng = np.random.default_rng(0)
    ids, layers, patches = model.ids("a red box and a blue ring"), 3, 16
    mean = rng.random((layers, len(ids), patches)).astype(np.float32)
    record = made_up(ids, mean, 1000 * mean[0, :, ::-1])
    units, grid = split_units(record, model.tokenizer), (4, 4)
    rel, lens, fuse = (METHODS[name].maps(record, units, grid) for name in ("rel", "lens", "fuse"))
    assert np.allclose(fuse.mean(axis=1), 0, atol=1e-5)
    for word in range(len(units)):
        with_rel, with_lens = (np.corrcoef(fuse[word], maps[word])[0, 1] for maps in (rel, lens))
        assert with_rel == pytest.approx(with_lens, abs=1e-4)  # though the logits are a thousand times larger
    flat = made_up(ids, np.ones_like(mean), np.ones_like(mean[0]))
    assert np.isfinite(METHODS["fuse"].maps(flat, units, grid)).all()


def test_tam_takes_away_what_earlier_words_explain():
    """Planted: the second token's logits are those of the first and a patch of its own; the third repeats the first."""
    first, second, patches = 5, 6, 16
    logits = np.zeros((4, patches))
    logits[0, :8] = logits[2, :8] = 4
    logits[1] = 3 * logits[0]
    logits[1, 8:] = 5
    logits[3] = -1  # what speaks against a token is no activation
    record = made_up([first, second, first, 0], np.ones((1, 4, patches)), logits)
    record = dataclasses.replace(record, text=np.array([[9, 9, 9, 9], [0, 2, 0, 0], [0, 7, 1, 0], [0, 1, 1, 1.0]]))
    units = [Unit("", (place,), 1, None) for place in range(4)]
    one, two, three, end = METHODS["tam"].maps(record, units, (4, 4))
    assert one.reshape(4, 4)[0].tolist() == [4] * 4 and two[:4].max() == 0 and two[15] == pytest.approx(5)
    # the third is explained by the second alone, whose 12 on the upper half fit its own 4 by least squares
    scale = (8 * 4 * 12) / (8 * 12**2 + 8 * 5**2)
    assert three[0] == pytest.approx(4 - 12 * scale) and three[15] == 0 and end.max() == 0


def test_heads_are_those_that_look_at_the_photo_and_at_one_place():
    heads = np.full((2, 4, 2, 64), 1e-4)  # two layers of four heads, two words
    scattered = np.random.default_rng(0).permutation(64)[:12]
    heads[0, :2, :, scattered] = 0.05  # they look at the photo, here and there
    for place, (layer, head) in enumerate([(0, 3), (1, 0), (1, 2)]):  # they look at one place for each word
        heads[layer, head, 0, 9 + place], heads[layer, head, 1, 53 + place] = 0.5, 0.5
    heads[1, 3, :, 30] = 0.01  # sharp, but hardly looks at the photo
    record = made_up([5, 6], np.ones((2, 2, 64)), heads=heads)
    maps = METHODS["heads"].maps(record, [Unit("", (0,), 1, None), Unit("", (1,), 1, None)], (8, 8))
    assert maps.argmax(axis=1).tolist() == [10, 54] and maps[:, 30].max() < 0.01


# ------------------------------------------------------------------------------------------- grounding


def test_auroc_and_cover_are_what_counting_gives():
    rng = np.random.default_rng(0)
    values, on = rng.integers(0, 5, 30).astype(float), rng.random(30)
    off = 1 - on
    weights = on[:, None] * off[None, :]
    wins = (values[:, None] > values[None, :]) + 0.5 * (values[:, None] == values[None, :])
    assert auroc(values, on, off) == pytest.approx((weights * wins).sum() / weights.sum())

    mask = rng.random((48, 64)) < 0.5
    whole = cover_on_grid(mask, (0, 0, 64, 48), (6, 8))
    assert np.allclose(whole, mask.reshape(6, 8, 8, 8).mean(axis=(1, 3)).reshape(-1))
    cropped = cover_on_grid(mask, (8, 0, 56, 48), (6, 6))
    assert np.allclose(cropped, mask[:, 8:56].reshape(6, 8, 6, 8).mean(axis=(1, 3)).reshape(-1))
    half = cover_on_grid(np.ones((4, 4), bool), (0.5, 0, 4.5, 4), (1, 4))  # half a pixel beyond the photo
    assert np.allclose(half, [1, 1, 1, 0.5])


def test_maps_that_know_nothing_score_at_chance_and_the_truth_scores_one():
    rng = np.random.default_rng(0)
    grid = (8, 8)
    table = GroundingTable(0)
    for photo in range(300):
        boxes = rng.permutation(16)[:2]
        covers = []
        for box in boxes:
            cover = np.zeros(grid)
            cover[2 * (box // 4) : 2 * (box // 4) + 2, 2 * (box % 4) : 2 * (box % 4) + 2] = 1
            covers.append(cover.reshape(-1))
        named = [Named("one", (1,), covers[0]), Named("two", (3, 4), covers[1])]
        controls = table.controls(rng.random((6, 64)), named, grid)
        table.add(str(photo), controls, named, ["a", "dog", "the", "red", "dog", "."])
    scores = table.scores()
    truth = scores["ground truth on the grid"]
    assert {truth[metric].corpus for metric in METRICS if metric != "lift"} == {1.0}
    assert truth["lift"].corpus == pytest.approx(16)
    for row in ("random maps", "centre", "caption mean", "shuffled words"):
        for metric in ("match_at_1", "pair_win"):
            low, high = interval(scores[row][metric], list(scores[row][metric].parts))
            assert low <= 0.5 <= high, (row, metric)
        assert abs(scores[row]["lift"].corpus - 1) < 0.35
    for row in ("centre", "caption mean"):  # whatever the word: exactly one half
        assert scores[row]["pair_win"].corpus == scores[row]["match_at_1"].corpus == 0.5
    content, text = table.summary("random maps")
    assert content["photos"] == 300 and content["objects"] == content["objects_among_others"] == 600
    assert "match_at_1, random maps less centre" in text and "last_mean" not in text
    change = content["less_centre"]["pair_win"]
    assert change["low"] <= 0 <= change["high"] and change["p"] > 0.05
    controls = {"random maps", "centre", "caption mean", "shuffled words", "ground truth on the grid"}
    assert set(content["rows"]) == controls


def test_shared_patches_count_for_neither():
    one, two = np.array([1.0, 1, 0, 0]), np.array([0.0, 1, 1, 0])
    named = [Named("one", (0,), one), Named("two", (1,), two)]
    maps = np.array([[0.5, 0.9, 0.1, 0.0], [0.1, 0.9, 0.5, 0.0]])  # both look most at what they share
    assert ground(maps, named, ["one", "two"])["match_at_1"] == (2.0, 2)
    assert ground(maps[::-1].copy(), named, ["one", "two"])["match_at_1"] == (0.0, 2)


def test_overlap_at_otsus_threshold_and_function_words_that_are_quiet():
    """By hand: the threshold is 1; of two patches above it one is the object's; "the" has three of four below it."""
    named = [Named("dog", (1,), np.array([1.0, 0, 0, 0]))]
    maps = np.array([[2.0, 0, 0, 0], [4, 3, 1, 0], [9, 9, 9, 9]])
    table = GroundingTable()
    table.add("photo", {"by hand": maps}, named, ["The", "dog", "runs"])
    scores = table.scores()["by hand"]
    assert scores["obj_iou"].corpus == 0.5 and scores["f1_iou"].corpus == pytest.approx(2 * 0.5 * 0.75 / 1.25)
    flat = np.ones((1, 4))  # nothing is above
    table.add("other", {"by hand": flat}, [Named("dog", (0,), named[0].cover)], ["dog"])
    scores = table.scores()["by hand"]
    assert scores["obj_iou"].corpus == 0.25 and scores["f1_iou"].corpus == pytest.approx(2 * 0.25 * 0.75 / 1.0)


def test_objects_are_found_once_and_as_whole_phrases():
    covers = dict.fromkeys(["hot dog", "dog", "person"], np.ones(4)) | {"bus": np.zeros(4)}
    found = find_named("a man eats a hot dog in a bus , a man".split(), covers)  # the model does not see the bus
    assert [(one.name, one.words) for one in found] == [("hot dog", (4, 5)), ("dog", (5,)), ("person", (1,))]
    assert find_named(["dogged"], covers) == []


def test_in_scripts_without_spaces_each_character_is_a_word():
    from types import SimpleNamespace

    from demo.standins import train_tokenizer
    from models.attribution import split_units

    tokenizer = train_tokenizer(["a red box", "the red box"])
    ids = [*tokenizer("a 红盒子 box").input_ids, tokenizer.eos_token_id]
    record = SimpleNamespace(
        ids=ids, mean=np.zeros((1, len(ids), 1)), shares=np.zeros((1, len(ids), 3)), probabilities=np.ones(len(ids))
    )
    assert [unit.text for unit in split_units(record, tokenizer)] == ["a", "红", "盒", "子", "box"]
