"""The README: its commands for real weights run on stand-ins of the same names, its links and pictures exist."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CLIP
from families import build

HERE = Path(__file__).parents[1]

# Takes the place of `python SCRIPT`: open_clip's names stand for tiny models, its download for a file of their weights.
STAND_INS = """
import json, runpy, sys
import open_clip
from open_clip import factory

clips = json.load(open("clips.json"))
factory._MODEL_CONFIGS.update(clips)
factory.download_pretrained = lambda cfg, **_: "clip.safetensors"
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands(page: str = "README.md") -> list[str]:
    """The block below a page's heading "With real weights"."""
    section = (HERE / page).read_text(encoding="utf-8").partition("## With real weights\n")[2]
    return re.search(r"```\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ").strip().splitlines()


@pytest.fixture
def place(tmp_path, data_root, decoders, llava_folder, monkeypatch) -> Path:
    """A working folder with configs/, ROOT, and tiny models under the published setting's names."""
    import open_clip
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    for name, target in {"configs": HERE / "configs", "ROOT": data_root, "gpt2": decoders["gpt2"]}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "llava-hf").mkdir()
    (tmp_path / "llava-hf/llava-1.5-7b-hf").symlink_to(llava_folder)
    for name, family in {
        "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
        "HuggingFaceTB/SmolVLM-Instruct": "idefics3",
    }.items():
        for part in build(family):
            part.save_pretrained(tmp_path / name)
    clip = CLIP | {"quick_gelu": True, "text_cfg": CLIP["text_cfg"] | {"context_length": 32, "vocab_size": 49408}}
    save_file(open_clip.model.CLIP(**clip).state_dict(), tmp_path / "clip.safetensors")
    names = ("ViT-L-14-quickgelu", "ViT-B-32-quickgelu")
    (tmp_path / "clips.json").write_text(json.dumps(dict.fromkeys(names, clip)))
    (tmp_path / "standins.py").write_text(STAND_INS)
    return tmp_path


def test_the_commands_for_real_weights_run_as_they_stand(place):
    scripts = []
    for command in commands():
        python, script, *args = shlex.split(command)
        assert python == "python"
        scripts.append(script)
        full = [sys.executable, "standins.py", str(HERE / script), *args]
        done = subprocess.run(full, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert scripts == [
        "p1_llava_caption.py", "p2_train.py", "p2_inference.py", "evaluate.py", "evaluate.py", "p3_visualize.py",
        "p3_visualize.py", "p1_llava_caption.py", "p3_visualize.py",
    ]  # fmt: skip
    settings = yaml.safe_load((place / "runs/p2_r32/config.yaml").read_text())
    assert (settings["encoder"]["model"], settings["decoder"]["model"], settings["lora"]["rank"]) == (
        "ViT-L-14-quickgelu", "gpt2", 32,
    )  # fmt: skip
    scores = json.loads((place / "runs/p2_r32/val.scores.json").read_text())
    assert scores["n"] == 4 and all(math.isfinite(score) for score in scores["corpus"].values())
    compared = json.loads((place / "runs/scores.json").read_text())
    assert [one["name"] for one in compared["runs"]] == ["llava.best", "llava.moderate", "llava.diverse"]
    assert (place / "runs/scores.html").is_file()
    for heatmaps, count in {"heatmaps": 2, "heatmaps_llava": 2, "heatmaps_smolvlm": 4}.items():  # 2: best and worst
        assert len(list((place / "runs" / heatmaps).glob("*.png"))) == count
    assert len(json.loads((place / "runs/qwen.json").read_text())) == 4


def test_the_heatmap_commands_for_real_weights_run_as_they_stand(place):
    found = commands("docs/grounding.md")
    for command in found:
        python, script, *args = shlex.split(command)
        assert (python, script) == ("python", "p3_visualize.py")
        done = subprocess.run([sys.executable, str(HERE / script), *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(found) == 2
    expected = {"where_llava": {"rel", "lens", "fuse", "relevancy"}, "where_qwen": {"fuse", "tam", "heads"}}
    for output, methods in expected.items():
        page = (place / "runs" / output / "index.html").read_text(encoding="utf-8")
        photos = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["photos"]
        assert len(photos) == 4 and all(set(photo["maps"]) == methods for photo in photos)


PAGES = [
    HERE / "README.md",
    HERE / "CONTRIBUTING.md",
    HERE / "benchmarks/GPU.md",
    *sorted((HERE / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (HERE / "docs/images").iterdir()}
    assert {"heatmap.jpg", "scores.png"} <= sizes.keys() and max(sizes.values()) <= 300_000


def test_readme_names_files_that_exist():
    """Paths such as `models/projector.py` or `data/photos` in the README and in docs/."""
    for page in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))):
        names = re.findall(
            r"`((?:common|data|models|metrics|pages|demo|report|benchmarks|configs|tests)/[\w./]*)`", page.read_text()
        )
        missing = [name for name in names if not any((HERE / f"{name}{end}").exists() for end in ("", ".py"))]
        assert missing == [], page.name
