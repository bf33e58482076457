"""The captioner against plain forms of the same mathematics, and what a checkpoint must keep."""

import dataclasses
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig

from common.config import UserError
from common.files import kept_folder
from models.captioner import build_captioner
from models.checkpoint import LORA_WEIGHTS, PROJECTOR, load_captioner, save_captioner
from models.decoder import DecoderConfig, attend_with, causal_lm, fuse_lora, load_decoder
from models.decoding import CACHE, Decoding, check_decoding, fixed_cache, prefill, until_eos
from models.encoder import EncoderConfig, PhotoTransform, build_encoder
from models.packing import ChunkedCrossEntropy, pack_rows
from models.projector import ProjectorConfig
from models.training import Stage, make_schedule, prepare_training, set_trainable

DECODERS = ["gpt2", "llama"]
TOKENS, WIDTH = 17, 32  # of the tiny CLIP: 16 patches and the class token


def error_of(ours: dict, theirs: dict) -> float:
    """Relative L2 distance over all tensors joined."""
    assert ours.keys() == theirs.keys()
    difference = math.sqrt(sum((ours[name] - theirs[name]).double().square().sum().item() for name in ours))
    return difference / math.sqrt(sum(tensor.double().square().sum().item() for tensor in theirs.values()))


def gradients(captioner, loss) -> dict:
    captioner.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in captioner.named_parameters() if p.requires_grad}


@pytest.fixture
def batch(tokenizer):
    """Features of three photos and their captions, of 3, 1 and 2 lengths."""
    torch.manual_seed(2)
    captions = [["a red box on a white wall", "box", "the blue thing on a field"], ["a photo"], ["red", "a white box"]]
    return torch.randn(3, TOKENS, WIDTH), [[tokenizer(caption).input_ids for caption in row] for row in captions]


def with_start(captioner):
    """The captioner with the decoder's own first token before the image."""
    decoder = dataclasses.replace(captioner.config.decoder, start_token=True)
    captioner.config = dataclasses.replace(captioner.config, decoder=decoder)
    return captioner


def plain_prefix(captioner, photos) -> torch.Tensor:
    """(B, P, D_image) -> (B, P, D_text), or one more where there is a start token."""
    image = captioner.projector(photos)
    if not captioner.config.decoder.start_token:
        return image
    first = torch.full((len(photos), 1), captioner.tokenizer.bos_token_id)
    return torch.cat([captioner.decoder.get_input_embeddings()(first), image], dim=1)


def plain_loss(captioner, features, captions, weights=None) -> torch.Tensor:
    """Sum of the losses, each pair run alone: no packing, no padding, full logits."""
    lm, eos, total = captioner.decoder, captioner.tokenizer.eos_token_id, 0.0
    for i, (photo, row) in enumerate(zip(features, captions)):
        for k, caption in enumerate(row):
            words = lm.get_input_embeddings()(torch.tensor([[eos, *caption]]))
            prefix = plain_prefix(captioner, photo[None])
            logits = lm(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
            loss = F.cross_entropy(logits[0, prefix.shape[1] :], torch.tensor([*caption, eos]), reduction="sum")
            total = total + loss * (weights[i][k] if weights else 1)
    return total


# ------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["packed", "one a row", "start token"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_loss_and_gradients_equal_the_plain_form(make_captioner, batch, decoder, form, attention, monkeypatch):
    monkeypatch.setitem(ChunkedCrossEntropy.CHUNKS, "cpu", 8)
    features, captions = batch
    captioner = make_captioner(decoder)
    if form == "start token":
        with_start(captioner)
    expected_loss = plain_loss(captioner, features, captions)
    expected = gradients(captioner, expected_loss)
    prepare_training(captioner, torch.float32, torch.device("cpu"))
    causal_lm(captioner.decoder).set_attn_implementation(attention)
    if form == "one a row":
        features = torch.stack([photo for photo, row in zip(features, captions) for _ in row])
        captions = [[caption] for row in captions for caption in row]
    loss, tokens = captioner(features, pack_rows(captions, captioner.tokenizer.eos_token_id))
    assert tokens == sum(len(caption) + 1 for row in captions for caption in row)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert error_of(gradients(captioner, loss), expected) < 1e-5


def test_a_weighted_caption_counts_so_much_in_loss_and_gradients(make_captioner, batch):
    features, captions = batch
    captioner, weights = make_captioner("gpt2"), [[0.5, 2.0, 0.0], [1.0], [1.5, 0.25]]
    expected_loss = plain_loss(captioner, features, captions, weights)
    expected = gradients(captioner, expected_loss)
    loss, _ = captioner(features, pack_rows(captions, captioner.tokenizer.eos_token_id, weights=weights))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert error_of(gradients(captioner, loss), expected) < 1e-5


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize("trainable", [True, False])
def test_chunked_cross_entropy_equals_torchs(monkeypatch, chunk, trainable):
    monkeypatch.setitem(ChunkedCrossEntropy.CHUNKS, "cpu", chunk)
    torch.manual_seed(0)
    head, hidden, labels = torch.nn.Linear(6, 30), torch.randn(10, 6, requires_grad=True), torch.randint(30, (10,))
    head.requires_grad_(trainable)
    weights = list(head.parameters()) if trainable else []
    counts = torch.rand(10)
    expected = (F.cross_entropy(head(hidden), labels, reduction="none") * counts).sum()
    loss = ChunkedCrossEntropy.apply(hidden, labels, counts, head, *weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 0.3, [hidden, *weights]), torch.autograd.grad(expected * 0.3, [hidden, *weights])
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_fused_lora_equals_pefts(make_captioner, decoder):
    captioner = make_captioner(decoder)
    torch.manual_seed(3)
    inputs, ids = torch.randn(2, 9, WIDTH), torch.randint(100, (2, 9))

    def results() -> tuple[torch.Tensor, dict]:
        prefix = captioner.projector(inputs)
        logits = captioner.decoder(inputs_embeds=prefix).logits
        return logits.detach(), gradients(captioner, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))

    expected_logits, expected = results()
    fuse_lora(captioner.decoder)
    logits, ours = results()
    assert error_of({"logits": logits}, {"logits": expected_logits}) < 1e-6
    assert error_of(ours, expected) < 1e-6
    captioner.decoder.disable_adapter_layers()
    plain = captioner.decoder(inputs_embeds=captioner.projector(inputs)).logits
    base, _ = load_decoder(captioner.config.decoder)
    torch.testing.assert_close(plain, base(inputs_embeds=captioner.projector(inputs)).logits)


def test_lora_is_on_every_linear_layer_and_changes_nothing_at_first(captioner_config):
    captioner = build_captioner(captioner_config("llama"))
    adapted = {name.split(".")[-4] for name, _ in captioner.decoder.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    ids = torch.arange(5)[None]
    base, _ = load_decoder(captioner.config.decoder)
    assert torch.equal(captioner.decoder(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("kind, normalize", [("linear", True), ("mlp", False), ("mlp", True)])
def test_projectors(make_captioner, kind, normalize, tmp_path):
    captioner = make_captioner(projector=ProjectorConfig(kind, normalize))
    features = torch.randn(2, TOKENS, WIDTH)
    same = torch.allclose(captioner.projector(features), captioner.projector(7 * features + 3), atol=1e-3)
    assert same == normalize
    save_captioner(captioner, tmp_path / "best")
    assert torch.equal(load_captioner(tmp_path / "best").projector(features), captioner.projector(features))


def test_schedules_count_optimizer_steps():
    def rates(stage: Stage, steps: int) -> list[float]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=stage.lr)
        schedule = make_schedule(optimizer, stage, steps_per_epoch=steps)
        got = []
        for _ in range(round(stage.epochs * steps)):
            got.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return got

    published = rates(Stage(epochs=3, lr=1e-3, schedule="warm_restarts", min_lr=1e-4), 834)
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 834)) / 2 for step in range(834)]
    cosine += [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 1668)) / 2 for step in range(1668)]
    assert published == pytest.approx(cosine)
    assert rates(Stage(epochs=2, lr=1e-3), 5) == [1e-3] * 10
    warm = rates(Stage(epochs=1, lr=1.0, schedule="cosine", warmup=0.2, min_lr=0.1), 20)
    assert warm[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]) and warm == warm[:4] + sorted(warm[4:], reverse=True)
    assert 0.1 < warm[-1] < 0.12


def test_adamw_without_weight_decay_is_adam_to_the_bit():
    learnt = []
    for optimizer in (torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=Stage().weight_decay)):
        torch.manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(20, 30))
        optimizer = optimizer([weights], lr=1e-2)
        for _ in range(20):
            weights.grad = torch.randn_like(weights)
            optimizer.step()
        learnt.append(weights.detach())
    assert torch.equal(*learnt)


@pytest.mark.parametrize("schedule", ["cosine", "warm_restarts"])
def test_the_projector_may_have_a_rate_of_its_own(make_captioner, schedule, capsys):
    stage = Stage(epochs=1, lr=1e-3, projector_lr=3e-3, schedule=schedule, min_lr=1e-4)
    captioner = make_captioner()
    optimizer = torch.optim.AdamW(set_trainable(captioner, "finetune", stage))
    assert re.search(r"projector .* 0.003\n +lora .* 0.001\n", capsys.readouterr().out)
    own = {id(parameter) for parameter in captioner.projector.parameters()}
    assert [{id(one) for one in group["params"]} == own for group in optimizer.param_groups] == [True, False]
    schedule, rates = make_schedule(optimizer, stage, steps_per_epoch=40), []
    for _ in range(40):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([3e-3, 1e-3]) and rates[-1] == pytest.approx([1e-4, 1e-4], rel=0.1)
    shares = [(projector - 1e-4) / 2.9e-3 for projector, _ in rates]
    assert shares == pytest.approx([(lora - 1e-4) / 0.9e-3 for _, lora in rates])


# ------------------------------------------------------------------------------------------- GPT-2 in a course's form


def gpt2_logits(state: dict, ids: torch.Tensor) -> torch.Tensor:
    """(T) ids -> (T, V) by GPT-2 small's equations: pre-norm blocks, 12 heads, tanh GELU, head tied to the words."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def affine(x, name):
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["wte.weight"][ids] + state["wpe.weight"][: len(ids)]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for block in (f"h.{i}" for i in range(12)):
        q, k, v = (
            part.view(len(ids), 12, 64).transpose(0, 1)
            for part in affine(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(768, dim=-1)
        )
        weights = (q @ k.transpose(1, 2) / 8).masked_fill(future, float("-inf")).softmax(-1)
        x = x + affine((weights @ v).transpose(0, 1).reshape(len(ids), 768), f"{block}.attn.c_proj")
        inner = affine(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + affine(inner, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ state["wte.weight"].T


def test_a_bare_state_dict_beside_the_tokenizer_files_is_gpt2(tmp_path, tokenizer):
    """A course's files, once they have the names that docs/results.md says."""
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    torch.manual_seed(0)
    shapes = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "ln_f.weight": (768,), "ln_f.bias": (768,)}
    for block in (f"h.{i}." for i in range(12)):
        for name, shape in {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072),
                            "mlp.c_proj": (3072, 768), "ln_1": (768,), "ln_2": (768,)}.items():  # fmt: skip
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[-1:]}
    state = {name: torch.empty(shape).uniform_(-0.05, 0.05) for name, shape in shapes.items()}
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(12)}
    torch.save(state | buffers, tmp_path / "pytorch_model.bin")
    lm, read = load_decoder(DecoderConfig(str(tmp_path)))
    ids = torch.tensor([50256, 3, 1, 4, 1, 5, 9, 2, 6])
    with torch.no_grad():
        torch.testing.assert_close(lm(input_ids=ids[None]).logits[0], gpt2_logits(state, ids), atol=1e-4, rtol=0)
    text = "a red box on a white wall"
    assert read(text).input_ids == tokenizer(text).input_ids and read.decode(read(text).input_ids) == text
    assert read.eos_token == "<|endoftext|>" and read.eos_token_id == tokenizer.eos_token_id


def test_real_gpt2_tokenizer_files(real_data, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=8)).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(real_data / "gpt2" / name, tmp_path / name)
    _, read = load_decoder(DecoderConfig(str(tmp_path)))
    assert (len(read), read.eos_token_id, read("Hello world").input_ids) == (50257, 50256, [15496, 995])


# ------------------------------------------------------------------------------------------- captions and checkpoints


def loud(captioner):
    """The captioner with an end of text that is likely enough for captions of many lengths."""
    eos = captioner.tokenizer.eos_token_id
    (head,) = [p for name, p in captioner.decoder.named_parameters() if "lm_head.lora_B" in name]
    with torch.no_grad():
        head[eos] = head.std() * torch.tensor([6.0, -6.0, 6.0, -6.0])
    return captioner.eval()


@pytest.fixture
def features():
    torch.manual_seed(4)
    return 2 * torch.randn(32, TOKENS, WIDTH)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=12), Decoding(max_new_tokens=6, num_beams=2)])
@pytest.mark.parametrize("decoder", DECODERS)
def test_same_captions_alone_in_a_batch_after_saving_and_merged(
    make_captioner, caption, features, decoder, decoding, start, tmp_path
):
    captioner = loud(make_captioner(decoder))
    without = caption(captioner, features, decoding)
    if start:
        with_start(captioner)
        assert caption(captioner, features, decoding) != without
    captions = caption(captioner, features, decoding)
    if decoding.num_beams == 1:
        assert len(set(captions)) > 16 and len({len(captioner.tokenizer(text).input_ids) for text in captions}) > 2
    assert [caption(captioner, photo[None], decoding)[0] for photo in features] == captions
    save_captioner(captioner, tmp_path / "run" / "best")
    loaded = load_captioner(tmp_path / "run")
    assert not loaded.training and loaded.config == captioner.config
    assert caption(loaded, features, decoding) == captions
    assert caption(loaded.ready(torch.device("cpu"), torch.float32), features, decoding) == captions


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_captions_are_what_training_finds_likeliest(make_captioner, caption, features, decoder, start):
    captioner, steps = loud(make_captioner(decoder)), 8
    if start:
        with_start(captioner)
    lm, eos = captioner.decoder, captioner.tokenizer.eos_token_id
    with torch.no_grad():
        for photo in features[:4]:
            ids = [eos]
            while len(ids) <= steps:
                words = lm.get_input_embeddings()(torch.tensor([ids]))
                logits = lm(inputs_embeds=torch.cat([plain_prefix(captioner, photo[None]), words], dim=1)).logits
                ids.append(logits[0, -1].argmax().item())
                if ids[-1] == eos:
                    break
            text = " ".join(captioner.tokenizer.decode(ids, skip_special_tokens=True).split())
            assert caption(captioner, photo[None], Decoding(max_new_tokens=steps)) == [text]


def test_a_start_token_is_bos_or_eos_and_takes_a_position(make_captioner):
    captioner = make_captioner("gpt2")  # 128 positions
    captioner.check_room(128 - TOKENS - 1, "x")
    with_start(captioner).check_room(128 - TOKENS - 2, "x")
    with pytest.raises(UserError, match="^x: 110 text tokens, the decoder has positions for 109"):
        captioner.check_room(128 - TOKENS - 1, "x")
    captioner, words = with_start(captioner), causal_lm(captioner.decoder).get_input_embeddings().weight
    for bos, expected in ((7, 7), (None, 5)):
        captioner.tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=5)
        prefix = captioner.prefix(torch.zeros(1, TOKENS, captioner.encoder.width))
        assert torch.equal(prefix[0, 0], words[expected])


@pytest.mark.parametrize("decoder", DECODERS)
def test_beams_share_the_image_and_find_what_transformers_finds(make_captioner, features, decoder):
    captioner, few = loud(make_captioner(decoder)), features[:6]
    lm, eos = causal_lm(captioner.decoder), captioner.tokenizer.eos_token_id
    with torch.no_grad():
        first = lm.get_input_embeddings()(torch.full((len(few), 1), eos))
        inputs = torch.cat([captioner.projector(few), first], dim=1)
        ids = lm.generate(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), num_beams=3,
                          max_new_tokens=8, eos_token_id=eos, pad_token_id=eos)  # fmt: skip
    seen = []
    hook = lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    beams = {"beams": Decoding(max_new_tokens=8, num_beams=3)}
    assert captioner.generate_from(few, beams, {"beams": ()})["beams"] == until_eos(ids, [eos])
    hook.remove()
    assert len(seen[0]) == len(few) and all(embeds is None for embeds in seen[1:])


RULES = [
    {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 6},
    {"num_beams": 3, "length_penalty": 3.0, "no_repeat_ngram_size": 2},
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(rule))
def test_rules_against_repetition_are_transformers_own_and_do_not_see_the_image(make_captioner, features, rule):
    captioner, few = loud(make_captioner("gpt2")), features
    lm, eos = causal_lm(captioner.decoder), captioner.tokenizer.eos_token_id
    with torch.no_grad():
        first = lm.get_input_embeddings()(torch.full((len(few), 1), eos))
        inputs = torch.cat([captioner.projector(few), first], dim=1)
        ids = lm.generate(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), max_new_tokens=12,
                          eos_token_id=eos, pad_token_id=eos, do_sample=False, **rule)  # fmt: skip
    decodings = {"plain": Decoding(max_new_tokens=12), "ruled": Decoding(max_new_tokens=12, **rule)}
    captions = captioner.generate_from(few, decodings, dict.fromkeys(decodings, ()))
    assert captions["ruled"] == until_eos(ids, [eos]) != captions["plain"]
    assert captions["plain"] == captioner.generate_from(few, {"alone": decodings["plain"]}, {"alone": ()})["alone"]


def test_a_length_penalty_is_for_beams():
    said = "x.length_penalty: only beams use it; expected x.num_beams with it"
    assert check_decoding("x", Decoding(length_penalty=2.0)) == [said]
    assert check_decoding("x", Decoding(length_penalty=2.0, num_beams=2)) == []


@pytest.mark.parametrize("window", [None, 6])
@torch.inference_mode()
def test_joined_caches_go_on_as_each_would_alone(window):
    """Two photos' prefixes read apart, each in three rows, by a decoder with and without a sliding window."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, initializer_range=0.5,
    )).eval()  # fmt: skip
    prefix, words = torch.randint(50, (2, 9)), torch.randint(50, (6, 5))
    cache = fixed_cache([prefill(lm.model, input_ids=row) for row in prefix.split(1)], repeats=3, room=5)
    expected = lm(torch.cat([prefix.repeat_interleave(3, dim=0), words], dim=1)).logits[:, -5:]
    kept = None if window else cache.layers[1].keys
    with attend_with(lm, "eager", after="sdpa"):
        logits = [lm(words[:, step : step + 1], **{CACHE: cache}).logits for step in range(5)]
    assert torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-4)
    assert window or cache.layers[1].keys is kept  # written in place
    assert lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("decoder", DECODERS)
def test_merging_keeps_logits_and_words(make_captioner, decoder):
    captioner = make_captioner(decoder)
    ids = torch.arange(40).view(2, 20)
    words = captioner.decoder.get_input_embeddings().weight.clone()
    with torch.no_grad():
        before = captioner.decoder(input_ids=ids).logits
        merged = captioner.ready(torch.device("cpu"), torch.float32).decoder
        after = merged(input_ids=ids).logits
    assert error_of({"logits": after}, {"logits": before}) < 1e-5
    assert torch.equal(merged.get_input_embeddings().weight, words)
    assert not torch.equal(merged.get_output_embeddings().weight, words)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_checkpoint_holds_what_was_learnt_and_nothing_else(make_captioner, tmp_path):
    captioner = make_captioner()
    save_captioner(captioner, tmp_path / "last", torch.float16, extra={"trainer.pt": {"epoch": 3}})
    files = {str(path.relative_to(tmp_path / "last")) for path in (tmp_path / "last").rglob("*") if path.is_file()}
    assert files == {"captioner.json", PROJECTOR, LORA_WEIGHTS, "decoder_lora/adapter_config.json", "trainer.pt"}
    stored = load_file(tmp_path / "last" / LORA_WEIGHTS)
    assert all("lora_" in name and tensor.dtype == torch.float16 for name, tensor in stored.items())
    loaded = load_captioner(tmp_path / "last")
    trained = dict(captioner.named_parameters())
    for name, parameter in loaded.named_parameters():
        kept = trained[name].half().float() if trained[name].requires_grad else trained[name]
        assert parameter.dtype == torch.float32 and torch.equal(parameter, kept), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it itself
def test_peft_reads_the_adapters_by_itself(make_captioner, decoders, tmp_path):
    import peft

    captioner = make_captioner()
    save_captioner(captioner, tmp_path / "best")
    base, _ = load_decoder(captioner.config.decoder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "best" / "decoder_lora")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs(input_ids=ids).logits, captioner.decoder(input_ids=ids).logits)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def without_one(file: Path) -> None:
    state = load_file(file)
    state.pop(min(state))
    save_file(state, file)


WIDER = {"layers.weight": torch.zeros(32, 48), "layers.bias": torch.zeros(32)}
SPOILT = {
    f"{PROJECTOR}: expected a safetensors file: No such file": lambda best: (best / PROJECTOR).unlink(),
    rf"{PROJECTOR}: of another model .*: 1 tensors, expected layers.weight \(32, 32\), got \(32, 48\)":
        lambda best: save_file(WIDER, best / PROJECTOR),
    f"{PROJECTOR}: expected a safetensors file": lambda best: (best / PROJECTOR).write_bytes(b"half a file"),
    "adapter_model.safetensors: of another model": lambda best: edit(best / "captioner.json", '"rank": 4', '"rank": 2'),
    "adapter_model.safetensors: of another model .*: 1 tensors, .*, got none":
        lambda best: without_one(best / LORA_WEIGHTS),
    "captioner.json: expected the settings of a captioner": lambda best: edit(best / "captioner.json", "rank", "rnk"),
    "decoder.model: /nowhere/.*: no such model folder":
        lambda best: edit(best / "captioner.json", '"model": "/', '"model": "/nowhere/'),
}  # fmt: skip


@pytest.mark.parametrize("message", SPOILT)
def test_checkpoints_of_another_model_are_refused(make_captioner, tmp_path, message):
    save_captioner(make_captioner(), tmp_path / "best")
    SPOILT[message](tmp_path / "best")
    with pytest.raises(UserError, match=message):
        load_captioner(tmp_path)


def test_killed_between_two_renames_the_checkpoint_is_still_found(make_captioner, tmp_path):
    captioner = make_captioner()
    save_captioner(captioner, tmp_path / "last")
    (tmp_path / "last").rename(kept_folder(tmp_path / "last"))  # where a kill leaves the old folder
    assert torch.equal(load_captioner(tmp_path).projector.layers.weight, captioner.projector.layers.weight)
    save_captioner(captioner, tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


# ------------------------------------------------------------------------------------------- the encoder


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PHOTOS = [(640, 480), (333, 501), (97, 97), (20, 31)]


@pytest.mark.parametrize("photo", PHOTOS)
def test_transform_equals_open_clips(clip_folder, photo):
    import open_clip

    *_, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    encoder = build_encoder(EncoderConfig(model="tiny", weights=str(clip_folder)))
    assert torch.equal(encoder.transform(noise(*photo)), preprocess(noise(*photo)))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "tf_efficientnet_lite0", "vit_base_patch16_clip_224"])
def test_transform_equals_timms(model):
    import timm

    encoder = build_encoder(EncoderConfig("timm", model, "random"), load_weights=False)
    cfg = timm.data.resolve_model_data_config(encoder.net)
    preprocess = timm.data.create_transform(**cfg, is_training=False)
    for photo in PHOTOS[:2]:
        assert torch.equal(encoder.transform(noise(*photo)), preprocess(noise(*photo)))


@pytest.mark.parametrize("resized", [48, 56, 55, None])
@pytest.mark.parametrize("width, height", [(640, 480), (333, 501), (500, 500), (70, 60)])
def test_seen_box_is_where_the_pixels_come_from(resized, width, height):
    """Each pixel of the photo says where it is: its red is its x, its green its y."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    place = Image.fromarray(np.uint8(np.round(255 * np.stack([x, y, 0 * x], axis=-1))))
    transform = PhotoTransform(48, resized, (0, 0, 0), (1, 1, 1), "bilinear")
    seen = transform(place)
    left, top, right, bottom = transform.seen_box(width, height)
    columns = (seen[0, 24] * width).tolist()
    rows = (seen[1, :, 24] * height).tolist()
    # the middles of the outermost transformed pixels lie half a step inside the box; a level of red is width / 255
    for got, low, high, edge in ((columns, left, right, width), (rows, top, bottom, height)):
        step = (high - low) / 48
        assert got[1] == pytest.approx(low + 1.5 * step, abs=1 + edge / 255)
        assert got[-2] == pytest.approx(high - 1.5 * step, abs=1 + edge / 255)


def test_features_are_the_towers_last_tokens(clip_folder):
    """As transformers' last_hidden_state: all tokens after the last block, before the final norm."""
    config = EncoderConfig(model="tiny", weights=str(clip_folder))
    encoder = build_encoder(config)
    assert (encoder.tokens, encoder.width, encoder.patch_rows_columns) == (17, 32, (4, 4))
    seen = []
    encoder.net.transformer.resblocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    pixels = torch.randn(2, 3, 32, 32)
    features = encoder(pixels)
    torch.testing.assert_close(features, seen[-1])
    patches = build_encoder(dataclasses.replace(config, class_token=False))
    assert patches.tokens == 16 and torch.equal(patches(pixels), features[:, 1:])
    earlier = build_encoder(dataclasses.replace(config, layer=0))
    assert earlier(pixels).shape == features.shape and not torch.allclose(earlier(pixels), features, atol=1e-2)
    assert len({encoder.fingerprint(), patches.fingerprint(), earlier.fingerprint()}) == 3
    squash = build_encoder(dataclasses.replace(config, resize="squash"))
    assert squash.fingerprint() != encoder.fingerprint()
    assert squash.transform.seen_box(60, 40) == (0, 0, 60, 40)
    assert encoder.transform.seen_box(60, 40) == (10, 0, 50, 40)


def test_pooled_patches_are_means_of_neighbours_on_a_coarser_grid(clip_folder):
    config = EncoderConfig(model="tiny", weights=str(clip_folder))
    encoder, pooled = build_encoder(config), build_encoder(dataclasses.replace(config, pool=2))
    pixels = torch.randn(2, 3, 32, 32)
    features, means = encoder(pixels), pooled(pixels)
    expected = features[:, 1:].view(2, 2, 2, 2, 2, 32).mean(dim=(2, 4)).view(2, 4, 32)
    torch.testing.assert_close(means, torch.cat([features[:, :1], expected], dim=1))
    assert (pooled.tokens, pooled.patch_rows_columns) == (5, (2, 2))
    assert pooled.transform == encoder.transform
    assert pooled.fingerprint() != encoder.fingerprint()
    with pytest.raises(UserError, match="encoder.pool: expected a divisor of 4 x 4 patches, got 3"):
        build_encoder(dataclasses.replace(config, pool=3))


def test_encoder_never_trains(make_captioner):
    captioner = make_captioner().train()
    assert captioner.training and captioner.projector.training
    assert not any(module.training for module in captioner.encoder.modules())
    assert not any(parameter.requires_grad for parameter in captioner.encoder.parameters())
    assert not captioner.encoder(torch.randn(1, 3, 32, 32)).requires_grad


@pytest.mark.parametrize("model, tokens, width, kept", [
    ("vit_tiny_patch16_224", 197, 192, True), ("vit_tiny_patch16_224", 196, 192, False),
    ("tf_efficientnet_lite0", 49, 1280, True),
])  # fmt: skip
def test_timm_shapes_without_weights(model, tokens, width, kept):
    encoder = build_encoder(EncoderConfig("timm", model, "random", class_token=kept), load_weights=False)
    assert (encoder.tokens, encoder.width) == (tokens, width) and encoder.device.type == "meta"


@pytest.mark.parametrize("config, message", [
    (EncoderConfig(model="no-such-model", weights="random"), "no-such-model.*[Uu]nknown|no-such-model.*not found"),
    (EncoderConfig("timm", "no_such_model", "random"), "no_such_model.*Unknown model"),
    (EncoderConfig("timm", "vit_tiny_patch16_224", "random", layer=40), "layer 40"),
    (EncoderConfig(model="ViT-B-32"), "encoder.weights: openai was trained with another activation"),
])  # fmt: skip
def test_encoders_that_are_not_to_be_had(config, message):
    with pytest.raises(UserError, match=message):
        build_encoder(config, load_weights=False)
