"""The whole suite at work with no download: `make demo`, or `python -m demo`.

Draws scenes, trains the stand-ins, captions the validation scenes with LLaVA's, trains a captioner of the scenes,
captions with it and a real photo with the one that ships, scores, and leaves everything in runs/demo with
`summary.json`. Each step is a command that could be typed by hand.
"""

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common.files import write_json
from data.predictions import read_predictions
from demo.shapes import pair_scores

ROOT = Path("runs/demo")
SHAPES, CLIP, LLAVA = ROOT / "shapes", ROOT / "standins/clip", ROOT / "standins/llava"
DECODINGS = ("best", "moderate", "diverse")
VAL = f"{SHAPES}/val.json"


def step(title: str, command: str) -> None:
    """Show and run one command of the README; its failure is the demo's."""
    print(f"\n=== {title}\n$ python {command}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *shlex.split(command)]).returncode
    if code:
        sys.exit(code)
    print(f"    {time.monotonic() - start:.0f} s", flush=True)


def real_photo() -> Path:
    """A photo that matplotlib ships: Grace Hopper's portrait (U.S. Navy, public domain)."""
    from matplotlib import get_data_path

    return Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"


def shuffled(predictions: Path) -> Path:
    """The same captions, each given to another scene: what a captioner that ignores the photo would score."""
    captions = read_predictions(predictions)
    stems = list(captions)
    order = random.Random(0).sample(stems, len(stems))
    giver = dict(zip(order, order[1:] + order[:1]))  # one cycle, so that none keeps its own
    other = predictions.with_name("val_shuffled.json")
    write_json(other, {stem: captions[giver[stem]] for stem in stems})
    return other


def corpus(predictions: Path) -> dict[str, float]:
    """The scores that evaluate.py left beside `predictions`."""
    return json.loads(predictions.with_suffix(".scores.json").read_text(encoding="utf-8"))["corpus"]


def main() -> None:
    run, captions, photo = ROOT / "p2", ROOT / "val.json", real_photo()
    step("Draw scenes of coloured shapes", f"-m demo.shapes --output {SHAPES}")
    step("Train the stand-ins for CLIP, GPT-2 and LLaVA", f"-m demo.standins --data {SHAPES} --output {ROOT}/standins")
    step(
        "P1: caption the validation scenes with LLaVA, three decodings for one look at each",
        f"p1_llava_caption.py --model {LLAVA} --images {SHAPES}/images/val --output {ROOT}/llava.json "
        f"--decoding {' '.join(DECODINGS)} --overwrite",
    )
    step(
        "P2: train a captioner of the scenes, in two stages",
        f"p2_train.py --config configs/shapes.yaml --data {SHAPES} --output {run} --overwrite",
    )
    step(
        "P2: caption the validation scenes",
        f"p2_inference.py --checkpoint {run} --images {SHAPES}/images/val --output {captions} --overwrite",
    )
    score = f"--annotations {VAL} --images {SHAPES}/images/val --clip_model local-dir:{CLIP}"
    step("Score the captions", f"evaluate.py --predictions {captions} {score}")
    step("Score them again, shuffled among the scenes", f"evaluate.py --predictions {shuffled(captions)} {score}")
    llava = {name: ROOT / f"llava.{name}.json" for name in DECODINGS}
    step(
        "Compare LLaVA's decodings and our captioner, photo by photo",
        f"evaluate.py --predictions {' '.join(map(str, llava.values()))} {captions} {score} "
        f"--output {ROOT}/scores.json --page {ROOT}/scores.html --overwrite",
    )
    compared = json.loads((ROOT / "scores.json").read_text(encoding="utf-8"))["runs"]
    own, other = corpus(captions), corpus(ROOT / "val_shuffled.json")
    pairs = pair_scores(read_predictions(captions), SHAPES / "instances_val.json")
    summary = {"cider": own["cider"], "cider_shuffled": other["cider"], **pairs}
    summary |= {f"cider_llava_{name}": one["corpus"]["cider"] for name, one in zip(llava, compared)}

    step(
        "P2: caption a real photo with the captioner that ships",
        f"p2_inference.py --checkpoint checkpoints/flickr8k --images {photo} --output {ROOT}/photo.json --overwrite",
    )

    step(
        "P3: where the words of that caption looked",
        f"p3_visualize.py --checkpoint checkpoints/flickr8k --images {photo} --output {ROOT}/look_photo --overwrite",
    )
    scenes = f"--images {SHAPES}/images/val --instances {SHAPES}/instances_val.json"
    pages = {"the captioner that ships": ROOT / "look_photo/index.html"}
    for whose, model, scores in (
        ("ours", f"--checkpoint {run}", captions.with_suffix(".scores.json")),
        ("llava", f"--model {LLAVA}", ROOT / "scores.json"),
    ):
        step(
            f"P3: do the words of {whose} look at what they name",
            f"p3_visualize.py {model} {scenes} --output {ROOT}/ground_{whose} --pictures false --overwrite",
        )
        step(
            f"P3: the best and the worst scenes of {whose} by CLIPScore",
            f"p3_visualize.py {model} {scenes} --scores {scores} --top 3 --bottom 3 --output {ROOT}/look_{whose} "
            "--overwrite",
        )
        pages[f"{whose}, stand-in"] = ROOT / f"look_{whose}/index.html"
    looks = json.loads((ROOT / "ground_ours/grounding.json").read_text(encoding="utf-8"))
    rows, method = looks["rows"], looks["method"]
    summary["match_at_1"] = rows[method]["match_at_1"]["score"]
    summary["match_at_1_last_mean"] = rows["last_mean"]["match_at_1"]["score"]
    summary["match_at_1_random_weights"] = rows[f"random weights, {method}"]["match_at_1"]["score"]
    summary["pointing"] = rows[method]["pointing"]["score"]
    write_json(ROOT / "summary.json", summary)

    print("\n=== Drawn scenes, validation")
    print(f"{'':28}{'its own captions':>18}{'shuffled':>12}")
    print(f"{'CIDEr-D':28}{own['cider']:>18.3f}{other['cider']:>12.3f}")
    print(f"{'CLIPScore (stand-in CLIP)':28}{own['clipscore']:>18.3f}{other['clipscore']:>12.3f}")
    print(f"{'named pairs in the scene':28}{pairs['pairs_right']:>18.1%}")
    print(f"{'things of the scene named':28}{pairs['pairs_found']:>18.1%}")
    for stem, caption in list(read_predictions(captions).items())[:3]:
        print(f"  {stem}: {caption}")
    print("\n=== LLaVA, three decodings of one scene")
    for name, file in llava.items():
        stem, caption = next(iter(read_predictions(file).items()))
        print(f"  {stem}, {name + ':':10} {caption:60} CIDEr-D of all {summary[f'cider_llava_{name}']:.3f}")
    print("\n=== Words on what they name: Match@1 (chance is a half, mostly) and pointing game of our captioner")
    for row in (method, "last_mean", "centre", f"random weights, {method}"):
        print(f"  {row:28}{rows[row]['match_at_1']['score']:>8.3f}{rows[row]['pointing']['score']:>8.3f}")
    print(f"\n=== A real photo\n  {photo.name}: {read_predictions(ROOT / 'photo.json')[photo.stem]}")
    print(
        f"\nPages: {ROOT}/scores.html, {', '.join(map(str, pages.values()))}; files: {captions}, {run}/loss.png, {ROOT}/summary.json"
    )


if __name__ == "__main__":
    main()
