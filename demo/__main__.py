"""The whole suite at work without any download: `make demo`, or `python -m demo`.

The steps: draw scenes, train the stand-in models, caption the validation scenes with the stand-in LLaVA, train a
captioner of the scenes, caption with it, caption a real photo with the captioner that ships, score, and draw heatmaps.
Each step is a command that a user can type. All results are in runs/demo; `summary.json` holds the main figures.
"""

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

from matplotlib import get_data_path

from common.files import write_json
from data.predictions import read_predictions
from demo.shapes import pair_scores

ROOT = Path("runs/demo")
SHAPES, CLIP, LLAVA = ROOT / "shapes", ROOT / "standins/clip", ROOT / "standins/llava"
RUN, CAPTIONS, SHUFFLED = ROOT / "p2", ROOT / "val.json", ROOT / "val_shuffled.json"
PHOTO = Path(get_data_path()) / "sample_data/grace_hopper.jpg"  # a portrait by the U.S. Navy, in the public domain
DECODINGS = ("best", "moderate", "diverse")
PHOTOS, SHIPPED = f"--images {SHAPES}/images/val", "--checkpoint checkpoints/flickr8k"


def step(title: str, command: str) -> None:
    """Show one command and run it; where it fails, the demo ends with its exit code."""
    print(f"\n=== {title}\n$ python {command}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *shlex.split(command)]).returncode
    if code:
        sys.exit(code)
    print(f"    {time.monotonic() - start:.0f} s", flush=True)


def write_shuffled() -> None:
    """Give each caption to another scene: the score of these is what a captioner that ignores the photo would get."""
    captions = read_predictions(CAPTIONS)
    stems = list(captions)
    order = random.Random(0).sample(stems, len(stems))
    giver = dict(zip(order, order[1:] + order[:1]))  # one cycle, so that no scene keeps its own caption
    write_json(SHUFFLED, {stem: captions[giver[stem]] for stem in stems})


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def score() -> dict[str, float]:
    """Score our captions, the shuffled ones and LLaVA's; the figures for `summary.json`."""
    given = f"--annotations {SHAPES}/val.json {PHOTOS} --clip_model local-dir:{CLIP}"
    step("Score our captions", f"evaluate.py --predictions {CAPTIONS} {given}")
    write_shuffled()
    step("Score our captions, shuffled among the scenes", f"evaluate.py --predictions {SHUFFLED} {given}")
    files = " ".join(f"{ROOT}/llava.{name}.json" for name in DECODINGS)
    given += f" --output {ROOT}/scores.json --page {ROOT}/scores.html --overwrite"
    step("Compare LLaVA's decodings and our captioner", f"evaluate.py --predictions {files} {CAPTIONS} {given}")
    ours, shuffled = (read(path.with_suffix(".scores.json"))["corpus"] for path in (CAPTIONS, SHUFFLED))
    pairs = pair_scores(read_predictions(CAPTIONS), SHAPES / "instances_val.json")
    runs = zip(DECODINGS, read(ROOT / "scores.json")["runs"])
    summary = {"cider": ours["cider"], "cider_shuffled": shuffled["cider"], **pairs}
    return summary | {f"cider_llava_{name}": one["corpus"]["cider"] for name, one in runs}


def draw_heatmaps() -> dict[str, float]:
    """Heatmaps of the real photo and of both captioners' scenes; the grounding figures for `summary.json`."""
    look = f"p3_visualize.py {SHIPPED} --images {PHOTO} --output {ROOT}/look_photo --overwrite"
    step("P3: heatmaps of the real photo, for each word of its caption", look)
    for name, model, scores in (
        ("ours", f"--checkpoint {RUN}", CAPTIONS.with_suffix(".scores.json")),
        ("llava", f"--model {LLAVA}", ROOT / "scores.json"),
    ):
        look = f"p3_visualize.py {model} {PHOTOS} --instances {SHAPES}/instances_val.json --method rel --overwrite"
        step(f"P3: grounding scores, {name}", f"{look} --output {ROOT}/ground_{name} --pictures false")
        look += f" --output {ROOT}/look_{name} --scores {scores} --top 3 --bottom 3"
        step(f"P3: heatmaps of the best and the worst scenes by CLIPScore, {name}", look)
    grounding = read(ROOT / "ground_ours/grounding.json")
    rows, method = grounding["rows"], grounding["method"]
    chosen = {"": method, "_last_mean": "last_mean", "_random_weights": f"random weights, {method}"}
    figures = {f"match_at_1{ending}": rows[row]["match_at_1"]["score"] for ending, row in chosen.items()}
    return figures | {"pointing": rows[method]["pointing"]["score"]}


def main() -> None:
    step("Draw scenes of coloured shapes", f"-m demo.shapes --output {SHAPES}")
    step("Train the stand-ins for CLIP, GPT-2 and LLaVA", f"-m demo.standins --data {SHAPES} --output {ROOT}/standins")
    llava = f"p1_llava_caption.py --model {LLAVA} {PHOTOS} --decoding {' '.join(DECODINGS)} --overwrite"
    step("P1: caption the validation scenes with LLaVA, three decodings", f"{llava} --output {ROOT}/llava.json")
    train = f"p2_train.py --config configs/shapes.yaml --data {SHAPES} --output {RUN} --overwrite"
    step("P2: train a captioner of the scenes, in two stages", train)
    caption = "p2_inference.py --overwrite"
    step("P2: caption the validation scenes", f"{caption} --checkpoint {RUN} {PHOTOS} --output {CAPTIONS}")
    step("P2: caption a real photo", f"{caption} {SHIPPED} --images {PHOTO} --output {ROOT}/photo.json")
    summary = score() | draw_heatmaps()
    write_json(ROOT / "summary.json", summary)

    print("\n=== Validation scenes")
    for name, value in summary.items():
        print(f"  {name:28}{value:>8.3f}")
    for stem, text in list(read_predictions(CAPTIONS).items())[:3]:
        print(f"  {stem}: {text}")
    print(f"\n=== A real photo\n  {PHOTO.name}: {read_predictions(ROOT / 'photo.json')[PHOTO.stem]}")
    pages = f"{ROOT}/scores.html, {ROOT}/look_photo/index.html, {ROOT}/look_{{ours,llava}}/index.html"
    print(f"\nPages: {pages}; files: {CAPTIONS}, {RUN}/loss.png, {ROOT}/summary.json")


if __name__ == "__main__":
    main()
