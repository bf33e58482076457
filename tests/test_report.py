"""The report: its steps, its stamps, its sentences, and the whole of it with tiny models under real names."""

import base64
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CLIP
from families import build
from selenium.webdriver.common.by import By

import common.config
from common.config import UserError, parse_config
from common.files import JsonLines
from report import __main__ as report, results, stamps
from report.architecture import captioner_parts, vlm_parts
from report.steps import Step, make_steps

HERE = Path(__file__).parents[1]


def module_and_flags(command: str):
    """The module that `python COMMAND` runs, and its flags."""
    first, *flags = shlex.split(command)
    name = flags.pop(0) if first == "-m" else first.removesuffix(".py")
    return importlib.import_module(name), flags


# ------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("small", [False, True])
def test_each_step_is_a_command_that_its_script_takes_and_needs_what_is_there(small):
    s = report.drawn_setting(report.Config(small=small))
    steps = make_steps(s, ("demo", "report"))
    made: list[Path] = []
    for step in steps:
        module, flags = module_and_flags(step.command)
        parse_config(module.Config, flags, getattr(module, "ALIASES", None))
        for path in step.needs:
            known = path.exists() or any(one == path or one in path.parents for one in made)
            assert known, f"{step.name} needs {path}, which no step before it makes"
        made += [step.output, *step.makes]
    outputs = [step.output for step in steps]
    assert len(set(outputs)) == len(outputs), "two steps write the same output"
    runs = [step for step in steps if step.command.startswith("p2_train.py")]
    assert len(runs) == 1 + 3 * 2  # the captioner shown, and three ranks by two seeds


def test_settings_that_do_not_go_together_end_before_anything_runs(tmp_path, monkeypatch, data_root):
    monkeypatch.setattr(report, "run_steps", lambda steps: pytest.fail("a step ran"))
    (tmp_path / "bad.yaml").write_text("lora: {rankk: 3}\n")
    for settings, message in (
        ({"data": data_root, "small": True}, "demo, small"),
        ({"model": "other/model"}, "data: expected it"),
        ({"data": tmp_path}, "train.json"),
        ({"data": data_root, "instances": tmp_path / "none.json"}, "instances: .*no such file"),
        ({"data": data_root, "configs": [tmp_path / "bad.yaml"]}, "lora.rankk: unknown setting"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(report.Config(**settings))


# ------------------------------------------------------------------------------------------- stamps


def test_steps_are_done_again_only_for_another_command_or_input(tmp_path, monkeypatch):
    given, made, ran = tmp_path / "given", tmp_path / "made.json", []

    def execute(command: str) -> int:
        ran.append(command)
        made.write_text("{}")
        return 0

    monkeypatch.setattr(stamps, "execute", execute)
    given.write_text("1")
    step = Step("Score", f"evaluate.py --predictions {given} --output {made}", (given,))
    stamps.run_steps([step])
    stamps.run_steps([step])
    assert ran == [f"{step.command} --overwrite"]
    given.write_text("22")
    stamps.run_steps([step])
    made.unlink()
    stamps.run_steps([step])
    stamps.run_steps([Step("Score", f"{step.command} --limit 3", (given,))])
    assert len(ran) == 4
    monkeypatch.setattr(stamps, "execute", lambda command: 3)
    with pytest.raises(SystemExit) as end:
        stamps.run_steps([step])
    assert end.value.code == 3 and not stamps.is_done(step)


def test_a_stopped_step_goes_on_with_its_own_work_only(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "execute", lambda command: 143)
    train = Step("Train", f"p2_train.py --output {tmp_path}/run")
    caption = Step("Caption", f"p2_inference.py --output {tmp_path}/val.json")
    scenes = Step("Draw", f"-m demo.shapes --output {tmp_path}/shapes")
    assert [stamps.more_flags(step) for step in (train, caption, scenes)] == [" --overwrite", " --overwrite", ""]
    (tmp_path / "run/last").mkdir(parents=True)
    (tmp_path / "run/last/trainer.pt").touch()
    (tmp_path / "val.journal.jsonl").touch()
    assert stamps.more_flags(train) == " --overwrite", "that work is somebody else's"
    for step in (train, caption, scenes):
        with pytest.raises(SystemExit):
            stamps.run_steps([step])
    assert [stamps.more_flags(step) for step in (train, caption, scenes)] == [" --resume", "", ""]
    other = Step("Draw", f"{scenes.command} --train 3")
    assert stamps.more_flags(other) == " --overwrite"


# ------------------------------------------------------------------------------------------- what it says


def change(low: float, high: float) -> dict:
    return {"difference": (low + high) / 2, "low": low, "high": high, "p": 0.5}


@pytest.mark.parametrize(
    "changes, says",
    [
        ([change(-0.1, 0.3)], "does not tell"),
        ([change(0.1, 0.3)], "is higher"),
        ([change(-0.3, -0.1)], "is lower"),
        ([change(0.1, 0.3), change(0.2, 0.3)], "is higher"),
        ([change(0.1, 0.3), change(-0.1, 0.3)], "does not tell"),
        ([change(0.1, 0.3), change(-0.3, -0.1)], "does not tell"),
        ([change(0.0, 0.3)], "does not tell"),
    ],
)
def test_a_difference_whose_interval_holds_zero_is_never_called_one(changes, says):
    assert f"CIDEr-D {says} " in results.finding("CIDEr-D", "rank 16", "rank 8", changes)


def test_likeness_is_the_mean_correlation_of_the_words_maps():
    rows = {"alike": [[0, 9, 0, 0], [0, 90, 0, 0], [0, 200, 0, 0]], "apart": [[9, 0, 9, 0], [0, 9, 0, 9], [9, 0, 9, 0]]}
    maps = {name: base64.b64encode(np.uint8(values).tobytes()).decode() for name, values in rows.items()}
    found = results.likeness([{"words": [{}, {}, {}], "maps": maps}])
    assert found == {"alike": pytest.approx(1), "apart": pytest.approx(-1 / 3)}  # of three pairs one is alike


def test_losses_are_in_the_order_of_the_steps(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    for stage, steps, loss in (("align", 4, 3.0), ("finetune", 8, 2.0)):
        log.append({"stage": stage, "epoch": 1, "step": 4, "steps": steps, "loss": loss, "lr": 0.1})
        log.append({"stage": stage, "epoch": 1, "steps": steps, "val_loss": loss + 1})
    curves, _ = results.losses(tmp_path)
    assert curves["training"] == [(4, 3.0), (8, 2.0)] and curves["validation"] == [(4, 4.0), (8, 3.0)]


# ------------------------------------------------------------------------------------------- from start to page


@pytest.fixture
def place(tmp_path, data_root, decoders, llava_folder, monkeypatch, fresh_accelerate) -> Path:
    """A working folder with configs/, ROOT, and tiny models under the published names; steps run in this process."""
    import open_clip
    from open_clip import factory
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava-hf").mkdir()
    for name, target in {
        "configs": HERE / "configs", "ROOT": data_root, "gpt2": decoders["gpt2"],
        "llava-hf/llava-1.5-7b-hf": llava_folder,
    }.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    clip = CLIP | {"quick_gelu": True, "text_cfg": CLIP["text_cfg"] | {"context_length": 32, "vocab_size": 49408}}
    save_file(open_clip.model.CLIP(**clip).state_dict(), tmp_path / "clip.safetensors")
    for name in ("ViT-L-14-quickgelu", "ViT-B-32-quickgelu"):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, clip)
    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, **_: "clip.safetensors")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own handlers stay

    def execute(command: str) -> int:
        module, flags = module_and_flags(command)
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
        try:
            common.config.run(module.main, module.Config, getattr(module, "ALIASES", None))
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.setattr(stamps, "execute", execute)
    return tmp_path


def test_the_command_for_real_weights_runs_to_its_page(place, browser, monkeypatch, capsys):
    flags = "--data ROOT --model llava-hf/llava-1.5-7b-hf --configs configs/p2_lora_r32.yaml configs/p2_lora_r8.yaml"
    cfg = parse_config(report.Config, shlex.split(flags + " --seeds 1"))
    report.main(cfg)
    said = capsys.readouterr().out
    assert "runs/report/index.html" in said and "cider_shuffled" in said
    monkeypatch.setattr(stamps, "execute", lambda command: pytest.fail(f"done again: {command}"))
    report.main(cfg)
    page = place / "runs/report/index.html"
    assert page.stat().st_size < 15e6
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page.read_text(encoding="utf-8"))

    browser.get(page.as_uri())
    text = browser.find_element(By.TAG_NAME, "main").text
    for piece in ("1.1434", "7,138,592", "2,375,048", "python p2_train.py --config configs/p2_lora_r32.yaml", "frozen"):
        assert piece in text, piece
    scores = json.loads((place / "runs/report/scores.json").read_text())["runs"]
    assert f"{scores[0]['corpus']['cider']:.3f}" in text
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in requests if not name.startswith("data:")] == []
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    painted = """return [...document.querySelectorAll('.tile canvas')].every(canvas =>
      canvas.getContext('2d').getImageData(canvas.width >> 1, canvas.height >> 1, 1, 1).data[3] > 0)"""
    assert browser.execute_script(painted)
    size = browser.get_window_size()
    for width in (380, 1400):
        browser.set_window_size(width, 900)
        wider = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(wider) <= 0, f"the page scrolls sideways at {width} px"
    browser.set_window_size(size["width"], size["height"])


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_5_vl", "idefics3", "internvl"])
def test_the_architecture_is_that_of_the_model(family, tmp_path):
    model, processor = build(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    parts = vlm_parts(str(tmp_path))
    counts = {part["part"]: part["parameters"] for part in parts}
    for name, module in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        assert counts[name] == sum(parameter.numel() for parameter in module.parameters()), name
    assert not any(part["stages"] for part in parts)


def test_the_architecture_of_ours_names_what_each_stage_trains(make_captioner):
    captioner = make_captioner()
    parts = {part["part"]: part for part in captioner_parts(captioner)}
    assert {name: part["stages"] for name, part in parts.items()} == {
        "encoder": [], "projector": ["align", "finetune"], "lora": ["finetune"], "decoder": [],
    }  # fmt: skip
    assert sum(part["parameters"] for part in parts.values()) == sum(p.numel() for p in captioner.parameters())
    assert parts["projector"]["shape"] == "17 x 32 -> 17 x 32" and "rank 4, alpha 8" in parts["lora"]["shape"]
