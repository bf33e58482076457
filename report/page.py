"""The page of the report, in the order of the report; what it says is computed in report/results.py.

A section is a list of blocks, which pages/report.js lays out: text, findings, tables, boxes, curves, a photo, maps. In
a table, {score, interval} and {difference, low, high, p} are cells. Under a block stand the commands of the outputs
that it names in `by`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metrics.table import LABELS
from pages.page import write_page
from report.results import changes_of, finding, likeness, losses, read, read_heatmaps, score_of, self_cider
from report.stamps import read_stamp
from report.steps import DECODINGS, Setting, Step

NAMES = {"llava": "the vision-language model", "ours": "our captioner"}
GROUNDING = {"match_at_1": "Match@1", "pointing": "accuracy in the pointing game"}
METHODS = ("last_mean", "last_max", "penult_mean", "penult_max")  # of the course report
PUBLISHED = {  # in the course report: CIDEr, CLIPScore; by rank also the trainable parameters
    "best": ("1.1434", "0.7726"), "moderate": ("0.9324", "0.7736"), "diverse": ("0.7376", "0.7606"),
    8: ("0.9717", "0.7331", 2_375_048), 16: ("0.9885", "0.7353", 3_962_896), 32: ("0.9727", "0.7367", 7_138_592),
}  # fmt: skip


def table(about: str, head: list, rows: list, *by: str) -> dict[str, Any]:
    return {"about": about, "table": {"head": head, "rows": rows}, "by": by}


def architecture(s: Setting) -> Iterator[dict]:
    for name, model in zip(NAMES, read(s.work / "architecture.json")):
        yield {"boxes": model["parts"], "about": f"{NAMES[name]}: {model['name']}", "by": ["architecture.json"]}


# ------------------------------------------------------------------------------------------- P1


def decodings(s: Setting, photo: dict) -> Iterator[dict]:
    """Settings, captions of one photo, scores, diversity."""
    files = {name: s.work / f"llava.{name}.json" for name in DECODINGS} | {"our captioner": s.work / "val.json"}
    keys = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")
    made = {name: read(files[name].with_suffix(".meta.json"))["decoding"] for name in DECODINGS}
    rows = [[name, *(made[name][key] for key in keys)] for name in DECODINGS]
    yield table("The three decodings", ["", *keys], rows, "llava.json")
    lines = [[name, read(file)[photo["stem"]]] for name, file in files.items()]
    yield {
        "photo": photo["photo"],
        "lines": lines,
        "about": f"One photo, four captions: {photo['stem']}",
        "by": ["llava.json", "val.json"],
    }

    compared, rows, found = read(s.work / "scores.json"), [[name] for name in files], []
    for place, metric in enumerate(("cider", "clipscore")):
        changes = changes_of(compared, metric)
        for row, run in zip(rows, compared["runs"]):
            change = changes.get(run["name"], "")
            row += [score_of(run, metric), change, PUBLISHED.get(row[0], ("", ""))[place]]
            found += [{"finding": finding(LABELS[metric], row[0], "best", [change])}] if change else []
    head = ["", *(text for name in ("CIDEr-D", "CLIPScore") for text in (name, "less best", "published"))]
    yield table(f"Scores of {compared['runs'][0]['n']} photos; 95% intervals over photos", head, rows, "scores.json")
    yield from found
    alike, columns = self_cider(s), ("unique", "length", "vocabulary", "distinct2")
    scores = {name: run["corpus"] for name, run in zip(DECODINGS, compared["runs"])}
    rows = [[name, *(scores[name][key] for key in columns), alike[name]] for name in scores]
    head = ["", *(LABELS[key] for key in columns), "self-CIDEr"]
    yield table("How diverse the captions are", head, rows, "scores.json", "again_1.json") | {"explain": "diversity"}


# ------------------------------------------------------------------------------------------- P2


def training(s: Setting) -> Iterator[dict]:
    """The captioner that is shown, then the configs side by side."""
    models, (curves, rate) = read(s.work / "architecture.json")[1:], losses(s.work / "p2")
    yield {"verbatim": s.captioner.read_text(encoding="utf-8"), "about": f"Hyper-parameters: {s.captioner}"}
    yield {"parameters": models[0]["parts"], "about": "Parameters by part and stage", "by": ["architecture.json"]}
    yield {"curves": curves, "about": "Loss a supervised token (nats), by optimizer step"}
    yield {"curves": rate, "about": "Learning rate, by optimizer step", "by": ["p2"]}
    yield from configs(s, models[1:])


def configs(s: Setting, models: list[dict]) -> Iterator[dict]:
    """The configs that are compared, and whether they differ."""
    compared = {f"compared_{seed}.json": read(s.work / f"compared_{seed}.json") for seed in range(s.seeds)}
    rows, scores, found = [], [], []
    for i, (config, model) in enumerate(zip(s.configs, models)):
        folders = [s.run(config, seed) for seed in range(s.seeds)]
        lora = yaml.safe_load((folders[0] / "config.yaml").read_text(encoding="utf-8"))["lora"]
        cider, clip, published = PUBLISHED.get(lora["rank"], ("", "", ""))
        runs = [one["runs"][i] if "runs" in one else one for one in compared.values()]
        scores.append([run["corpus"]["cider"] for run in runs])
        trained = sum(part["parameters"] for part in model["parts"] if part["stages"])
        best = [min(loss for _, loss in losses(folder)[0]["validation"]) for folder in folders]
        row = [config.stem, f"{lora['rank']}, {lora['alpha']:g}", trained, published, best]
        row += [[score_of(run, "cider") for run in runs], float(np.mean(scores[-1])), cider]
        rows.append([*row, [score_of(run, "clipscore") for run in runs], clip])
        for metric in ("cider", "clipscore") if i else ():
            changes = [changes_of(one, metric).get(run["name"]) for one, run in zip(compared.values(), runs)]
            text = finding(LABELS[metric], config.stem, s.configs[0].stem, list(filter(None, changes)))
            found += [{"finding": text}] if any(changes) else []
    head = ["config", "rank, alpha", "trained", "published", "validation loss", "CIDEr-D", "mean", "published"]
    about = f"Configs compared; runs with {s.seeds} seed{'s' * (s.seeds > 1)}, in the order of the seeds"
    yield table(about, [*head, "CLIPScore", "published"], rows, *compared)
    yield from found
    if s.seeds > 1 and len(rows) > 1:
        seed, config = np.ptp(scores, axis=1).max(), np.ptp(np.mean(scores, axis=1))
        text = f"Another seed changes CIDEr-D by up to {seed:.3f}, another config its mean by up to {config:.3f}."
        yield {"finding": text}


# ------------------------------------------------------------------------------------------- P3


def maps(name: str, folder: str, photo: dict, methods: tuple[str, ...]) -> dict[str, Any]:
    """Words x methods of one photo."""
    about = ", ".join(filter(None, (photo["stem"], NAMES.get(name, name), photo["note"])))
    return {"maps": photo, "methods": list(dict.fromkeys(methods)), "about": about, "by": [folder]}


def heatmaps(s: Setting, same: dict[str, dict]) -> Iterator[dict]:
    """Five photos by the report's methods, the best and the worst photo, shares of attention."""
    photos = {name: {photo["stem"]: photo for photo in page["photos"]} for name, page in same.items()}
    stems = [stem for stem in photos["ours"] if stem in photos["llava"]]
    for stem in stems[:: max(1, len(stems) // 5)][:5]:
        for name in same:
            yield maps(name, f"same_{name}", photos[name][stem], (*METHODS, s.method))
    for name in same:
        chosen = read_heatmaps(s.work / f"look_{name}")["photos"]
        for photo in (chosen[0], chosen[-1]):
            yield maps(name, f"look_{name}", photo, ("last_mean", s.method))
    if s.drawn:
        (photo,) = read_heatmaps(s.work / "look_photo")["photos"]
        yield maps("the captioner that ships", "look_photo", photo, ("last_mean", "fuse"))
    for name, page in same.items():
        mean = np.mean([word["shares"] for photo in page["photos"] for word in photo["words"]], axis=0)  # (layers, 3)
        about = f"Attention of {NAMES[name]}, percent by layer"
        yield {"attention": mean.tolist(), "about": about, "by": [f"same_{name}"]}
        where = f"in {(mean[:, 0] > mean[:, 1]).sum()} of {len(mean)} layers"
        than = "than to the caption so far ({:.0f}% and {:.0f}% on average)".format(*mean.mean(axis=0))
        yield {"finding": f"{NAMES[name]}: {where} more attention goes to the photo {than}."}


def grounding(s: Setting, same: dict[str, dict]) -> Iterator[dict]:
    """Likeness of the words' maps beside Match@1, and the grounding scores with their controls."""
    found = {name: read(s.work / f"ground_{name}/grounding.json") for name in same if s.instances}
    alike = {name: likeness(page["photos"]) for name, page in same.items()}
    rows = [[method] for method in alike["ours"]]
    for row in rows:
        for name in same:
            row += [alike[name][row[0]], found[name]["rows"][row[0]]["match_at_1"] if found else ""]
    head = ["method", *(f"{what}, {name}" for name in same for what in ("likeness", "Match@1"))]
    about = "How alike the maps of one caption's words are (mean correlation; 1: the same map), beside Match@1"
    yield table(about, head, rows, "same_ours", "same_llava")
    for name, of in alike.items():
        low, *_, high = (f"{method} ({of[method]:.2f})" for method in sorted(of, key=of.get))
        yield {"finding": f"{NAMES[name]}: maps of one caption's words are most alike with {high}, least with {low}."}
    for name, result in found.items():
        about = f"{NAMES[name]}: {result['objects']} objects named in {result['photos']} photos; controls last"
        yield {"grounding": result["rows"], "about": about, "by": [f"ground_{name}"]}
        for other, metric in (("last_mean", "match_at_1"), ("last_mean", "pointing"), ("centre", "pointing")):
            if change := result.get(f"less_{other}", {}).get(metric):
                yield {"finding": f"{NAMES[name]}: {finding(GROUNDING[metric], s.method, other, [change])}"}


def write_report(page: Path, s: Setting, steps: list[Step]) -> None:
    """Write the page of all results."""
    same = {name: read_heatmaps(s.work / f"same_{name}") for name in NAMES}
    done = [[step.name, f"python {step.command}", read_stamp(step).get("seconds", "")] for step in steps]
    sections = {
        "Architecture": architecture(s),
        "P1: captions without training": decodings(s, same["llava"]["photos"][0]),
        "P2: training few parameters": training(s),
        "P3: where each word looked": heatmaps(s, same),
        "Do the maps show what the words name?": grounding(s, same),
        "How this page was made": [table("Every step", ["step", "command", "seconds"], done)],
    }
    commands = {str(step.output.relative_to(s.work)): f"python {step.command}" for step in steps}
    data = {"sections": {title: list(blocks) for title, blocks in sections.items()}, "commands": commands}
    write_page(page, "report", "The report", data | {"colours": same["ours"]["colours"]})
