"""Weights from strangers: no code of theirs runs, and what does not fit is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import p2_inference
import p3_visualize
from common.config import UserError
from data.photos import Photo, load_photo
from data.predictions import read_predictions
from metrics.clipscore import load_clip
from models.captioner import Captioner
from models.checkpoint import MergeConfig, find_checkpoint, main as merge, save_captioner
from models.decoder import DecoderConfig, load_decoder
from models.decoding import Decoding
from models.encoder import EncoderConfig, build_encoder
from models.vlm import PROMPT, load_vlm

# ------------------------------------------------------------------------------------------- code


@pytest.fixture
def evil(tmp_path, monkeypatch) -> str:
    """A Python file that leaves a trace where it is run; standard input would say yes to all."""
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("standard input was asked") or "y")
    yield code + "from transformers import GPT2Config as Config, GPT2LMHeadModel as Model, GPT2Tokenizer as Tokenizer\n"
    assert not (tmp_path / "ran").exists()


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_clip_that_asks_for_code_is_refused_by_name(clip_folder, tmp_path, evil, monkeypatch):
    folder = copy(clip_folder, tmp_path / "clip")
    (folder / "evil.py").write_text(evil)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": True}}
    edit(folder / "open_clip_config.json", model_cfg=config)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    with pytest.raises(UserError, match=r"^clip_model: local-dir:.*clip: its open_clip_config.json asks for trust_rem"):
        load_clip(f"local-dir:{folder}")
    with pytest.raises(UserError, match="^encoder.weights: .*clip: its open_clip_config.json asks for trust_remote_co"):
        build_encoder(EncoderConfig(model="tiny", weights=str(folder)))
    monkeypatch.setattr("open_clip.get_model_config", lambda name: config)
    with pytest.raises(UserError, match="^clip_model: hf-hub:a/b: its open_clip_config.json asks for trust_remote_co"):
        load_clip("hf-hub:a/b")


def test_code_beside_a_model_is_never_run_and_nobody_is_asked(decoders, llava_folder, tmp_path, evil):
    for name, load in (
        ("decoder", lambda folder: load_decoder(DecoderConfig(str(folder)))),
        ("llava", lambda folder: load_vlm(str(folder), PROMPT, torch.device("cpu"), torch.float32)),
    ):
        folder = copy({"decoder": decoders["gpt2"], "llava": llava_folder}[name], tmp_path / name)
        (folder / "evil.py").write_text(evil)
        kinds = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
        auto = {"AutoConfig": "evil.Config"} | dict.fromkeys(kinds, "evil.Model")
        edit(folder / "config.json", auto_map=auto, model_type="evil")
        with pytest.raises(UserError, match="odel: could not load .* comes with code of its own"):
            load(folder)


# ------------------------------------------------------------------------------------------- tensors


def spoil(file: Path, kind: str) -> None:
    state = load_file(file)
    name = next(name for name in sorted(state) if "mlp" in name and name.endswith("weight"))
    if kind == "missing":
        state.pop(name)
    elif kind == "mismatched":
        state[name] = state[name][:-1].clone()
    else:
        added = {
            "unexpected": "odd.weight",
            "classifier": "score.weight",
            "constant": "transformer.h.0.attn.masked_bias",
        }
        state[added[kind]] = torch.zeros(2)
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched", "classifier", "constant"])
@pytest.mark.parametrize("name", ["decoder", "llava"])
def test_models_whose_tensors_do_not_fit(decoders, llava_folder, tmp_path, name, kind):
    folder = copy(decoders["gpt2"] if name == "decoder" else llava_folder, tmp_path / name)
    spoil(folder / "model.safetensors", kind)

    def load():
        if name == "decoder":
            return load_decoder(DecoderConfig(str(folder)))
        return load_vlm(str(folder), PROMPT, torch.device("cpu"), torch.float32)

    if kind in ("classifier", "constant"):  # files of earlier releases of transformers hold such constants
        return load()
    with pytest.raises(UserError, match="odel: ") as error:
        load()
    said = str(error.value)
    assert f"its weights do not fit: 1 {kind}, such as " in said and ("mlp" in said or "odd.weight" in said)


TIMM = "test_vit"


@pytest.mark.parametrize("change, said", [
    (lambda state: {"x": torch.zeros(1)}, "Missing key"),
    (lambda state: dict(list(state.items())[3:]), "Missing key"),
    (lambda state: state | {"odd": torch.zeros(1)}, "Unexpected key.*odd"),
    (lambda state: timm.create_model("test_vit2").state_dict(), "key|size"),
    (lambda state: timm.create_model(TIMM, num_classes=5).state_dict() | {"norm.bias": torch.zeros(7)}, "norm.bias"),
])  # fmt: skip
def test_timm_files_whose_tensors_do_not_fit(tmp_path, change, said):
    torch.save(change(timm.create_model(TIMM).state_dict()), tmp_path / "net.pth")
    with pytest.raises(UserError, match=f"encoder: timm gives no test_vit with weights .*net.pth.*({said})"):
        build_encoder(EncoderConfig("timm", TIMM, str(tmp_path / "net.pth")))


@pytest.mark.parametrize("classes", [0, 5, 1000])
def test_timm_files_with_any_classifier_are_read(tmp_path, classes):
    net = timm.create_model(TIMM, num_classes=classes)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "a.pth"
    )
    encoder = build_encoder(EncoderConfig("timm", TIMM, str(tmp_path / "a.pth")))
    stored = {name: value for name, value in net.state_dict().items() if not name.startswith("head.")}
    found = encoder.net.state_dict()
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)


# ------------------------------------------------------------------------------------------- sharing


@pytest.fixture
def run(make_captioner, tmp_path) -> Path:
    save_captioner(make_captioner("gpt2"), tmp_path / "run/best")
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((40, 30), 80 + 40 * number).convert("RGB").save(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def test_a_captioner_of_the_hub_is_one_of_disk(run, photos, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(run))
    options = {"images": photos, "device": "cpu", "features": tmp_path / "none"}
    for name in (run, Path("someone/captioner")):
        p2_inference.main(p2_inference.Config(name, output=tmp_path / f"{name.name}.json", **options))
    assert read_predictions(tmp_path / "run.json") == read_predictions(tmp_path / "captioner.json")
    p3_visualize.main(p3_visualize.Config(checkpoint=Path("someone/captioner"), output=tmp_path / "maps", **options))
    assert (tmp_path / "maps/index.html").exists() and set(asked) == {"someone/captioner"}


def test_a_name_that_no_hub_has_is_one_line():
    with pytest.raises(UserError, match="^checkpoint: no/body: no such folder here, and not from a model hub: the hub"):
        find_checkpoint(Path("no/body"))


def test_a_merged_captioner_is_a_plain_model_that_captions_alike(run, tmp_path, caption):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.checkpoint import load_captioner

    merge(MergeConfig(run, tmp_path / "merged"))
    files = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*.safetensors")}
    assert files == {"projector.safetensors", "decoder/model.safetensors"}
    tuned = load_captioner(run)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/decoder", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged/decoder")
    plain = Captioner(tuned.encoder, tuned.projector, lm.eval(), tokenizer, tuned.config)
    tuned.projector.load_state_dict(load_file(tmp_path / "merged/projector.safetensors"))
    torch.manual_seed(0)
    features, decoding = 2 * torch.randn(8, tuned.encoder.tokens, tuned.encoder.width), Decoding(12)
    captions = caption(tuned, features, decoding)
    assert caption(plain, features, decoding) == captions and len(set(captions)) > 2
    with pytest.raises(UserError, match="output: .*merged exists"):
        merge(MergeConfig(run, tmp_path / "merged"))


def test_the_shipped_captioner_merges_too(tmp_path):
    """Its decoder comes from a GGUF file, which transformers by itself does not save again."""
    from transformers import AutoModelForCausalLM

    from models.checkpoint import load_captioner
    from report.steps import PHOTO

    merge(MergeConfig(Path("checkpoints/flickr8k"), tmp_path / "merged"))
    tuned, photo = load_captioner(Path("checkpoints/flickr8k")), [load_photo(Photo("photo", PHOTO))]
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/decoder", dtype=torch.float32)
    plain = Captioner(tuned.encoder, tuned.projector, lm.eval(), tuned.tokenizer, tuned.config)
    captions = [one.generate(photo, {"own": Decoding(20)}, {"own": ()}) for one in (plain, tuned)]
    assert captions[0] == captions[1] and len(captions[0]["own"][0]) > 4
