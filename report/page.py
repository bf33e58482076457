"""The page of the report, in the order of the report; what it says is computed in report/results.py.

A section is a list of blocks, which pages/report.js lays out: text, findings, tables, boxes, curves, a photo, maps. In
a table, {score, interval} and {difference, low, high, p} are cells. Under a block stand the commands of the outputs
that it names in `by`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metrics.table import LABELS
from models.training import STAGES
from pages.page import write_page
from report.results import finding, likeness, losses, read, read_heatmaps, read_settings, score_of, self_cider
from report.stamps import read_stamp
from report.steps import DECODINGS, Setting, Step

METHODS = ("last_mean", "last_max", "penult_mean", "penult_max")  # of the course report
PUBLISHED = {  # of the course report: CIDEr, CLIPScore; and by rank the trainable parameters
    "best": (1.1434, 0.7726), "moderate": (0.9324, 0.7736), "diverse": (0.7376, 0.7606),
    8: (0.9717, 0.7331, 2_375_048), 16: (0.9885, 0.7353, 3_962_896), 32: (0.9727, 0.7367, 7_138_592),
}  # fmt: skip
WHY = (
    "Columns named published hold the figures of the course report: LLaVA-1.5-7B, and CLIP ViT-L/14 with GPT-2 small, "
    "on the photos of a course, which are not public. The figures beside them are of other photos, and on drawn scenes "
    "of other weights too. So they cannot be equal; what can be compared is which one is higher."
)
NAMES = {"ours": "our captioner", "llava": "the vision-language model"}
GROUNDING = ("match_at_1", "pair_win", "pointing", "auroc")
SHOWN = (
    "encoder.model",
    "projector.kind",
    "decoder.model",
    "lora.rank",
    "lora.alpha",
    "batch_size",
    "captions_per_row",
)
SHOWN += ("precision", *(f"{stage}.{key}" for stage in STAGES for key in ("epochs", "lr", "schedule", "min_lr")))
Block = dict[str, Any]


def table(about: str, head: list, rows: list, *by: str) -> Block:
    return {"about": about, "table": {"head": head, "rows": rows}, "by": by}


def changes_of(compared: dict, metric: str) -> dict[str, dict]:
    """Paired differences from the first run, by the name of the other run."""
    return {change["run"]: change for change in compared.get("paired", ()) if change["metric"] == metric}


def architecture(s: Setting) -> Iterator[Block]:
    for name, model in zip(("llava", "ours"), read(s.work / "architecture.json")):
        yield {"boxes": model["parts"], "about": f"{NAMES[name]}: {model['name']}", "by": ["architecture.json"]}


def decodings(s: Setting, photo: dict) -> Iterator[Block]:
    """P1: settings, captions of one photo, scores, diversity."""
    compared = read(s.work / "scores.json")
    runs, files = compared["runs"], [*(s.work / f"llava.{name}.json" for name in DECODINGS), s.work / "val.json"]
    names = [*DECODINGS, "ours, greedy"]
    keys = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")
    metas = [read(file.with_suffix(".meta.json"))["decoding"] for file in files[:3]]
    settings = [[name, *(meta[key] for key in keys)] for name, meta in zip(names, metas)]
    yield table("The three decodings", ["", *keys], settings, "llava.json")
    lines = [[name, read(file)[photo["stem"]]] for name, file in zip(names, files)]
    yield {"photo": photo["photo"], "lines": lines, "about": photo["stem"], "by": ["llava.json", "val.json"]}

    rows, found, columns = [[name] for name in names], [], ("unique", "length", "vocabulary", "distinct2")
    for place, metric in enumerate(("cider", "clipscore")):
        changes = changes_of(compared, metric)
        for row, run in zip(rows, runs):
            change, published = changes.get(run["name"], ""), PUBLISHED.get(row[0], ("", ""))[place]
            row += [score_of(run, metric), change, published]
            found += [finding(LABELS[metric], row[0], "best", [change])] if change else []
    head = ["", *(text for name in ("CIDEr-D", "CLIPScore") for text in (name, "less best", "published"))]
    yield table(f"Scores of {runs[0]['n']} photos; 95% intervals over photos", head, rows, "scores.json")
    yield from ({"finding": text} for text in found)
    alike = self_cider(s)
    varied = [[name, *(run["corpus"][key] for key in columns), alike[name]] for name, run in zip(DECODINGS, runs)]
    about = (
        "How diverse the captions are. Self-CIDEr: a caption against others of its photo by other seeds; 10: all alike"
    )
    yield table(about, ["", *(LABELS[key] for key in columns), "self-CIDEr"], varied, "scores.json", "again_1.json")


def training(s: Setting) -> Iterator[Block]:
    """P2: the captioner that is shown, then the configs side by side."""
    settings, models = read_settings(s.work / "p2"), read(s.work / "architecture.json")[1:]
    yield table("Hyper-parameters", ["setting", "value"], [[key, str(settings[key])] for key in SHOWN], "p2")
    rows = [
        [part["part"], part["parameters"], *("trained" if stage in part["stages"] else "frozen" for stage in STAGES)]
        for part in models[0]["parts"]
    ]
    yield table("Parameters by part and stage", ["part", "parameters", *STAGES], rows, "architecture.json")
    curves = losses(s.work / "p2")
    rate = {"learning rate": curves.pop("learning rate")}
    yield {"curves": curves, "about": "Loss a supervised token (nats), by optimizer step"}
    yield {"curves": rate, "about": "Learning rate, by optimizer step", "by": ["p2"]}
    yield from configs(s, models[1:])


def configs(s: Setting, models: list[dict]) -> Iterator[Block]:
    """The configs that are compared, and whether they differ."""
    files = [f"compared_{seed}.json" for seed in range(s.seeds)]
    compared = [read(s.work / file) for file in files]
    rows, means, spreads, found = [], [], [], []
    for i, (config, model) in enumerate(zip(s.configs, models)):
        folders = [s.run(config, seed) for seed in range(s.seeds)]
        rank, alpha = (read_settings(folders[0])[f"lora.{key}"] for key in ("rank", "alpha"))
        cider, clip, trained = PUBLISHED.get(rank, ("", "", ""))
        runs = [one["runs"][i] if "runs" in one else one for one in compared]
        scores = [run["corpus"]["cider"] for run in runs]
        means, spreads = [*means, np.mean(scores)], [*spreads, max(scores) - min(scores)]
        own = sum(part["parameters"] for part in model["parts"] if part["stages"])
        loss = [min(value for _, value in losses(folder)["validation"]) for folder in folders]
        row = [
            config.stem,
            f"{rank}, {alpha:g}",
            own,
            trained,
            loss,
            [score_of(run, "cider") for run in runs],
            means[-1],
        ]
        rows.append([*row, cider, [score_of(run, "clipscore") for run in runs], clip])
        changes = [changes_of(one, "cider").get(run["name"]) for one, run in zip(compared, runs)] if i else []
        found += [finding(LABELS["cider"], config.stem, s.configs[0].stem, changes)] if i else []
    head = ["config", "rank, alpha", "trained parameters", "published", "validation loss", "CIDEr-D", "mean"]
    about = f"Configs compared; {s.seeds} seeds each, in the order of the seeds"
    yield table(about, [*head, "published", "CLIPScore", "published"], rows, *files)
    if s.seeds > 1 and len(rows) > 1:
        other = f"another config changes its mean by up to {max(means) - min(means):.3f}"
        found.append(f"Another seed changes CIDEr-D by up to {max(spreads):.3f}, {other}.")
    yield from ({"finding": text} for text in found)


def maps(name: str, folder: str, photo: dict, methods: tuple[str, ...]) -> Block:
    """Words x methods of one photo."""
    kept = {key: photo[key] for key in ("photo", "size", "box", "grid", "words", "caption")}
    if "shares" in photo["words"][0]:  # then the seen box is given in pixels: left, top, right, bottom
        (left, top, right, bottom), (width, height) = photo["box"], photo["size"]
        box = left / width, top / height, (right - left) / width, (bottom - top) / height
        kept["box"] = [100 * share for share in box]
    kept["maps"] = {method: photo["maps"][method] for method in dict.fromkeys(methods)}
    return {"maps": kept, "about": ", ".join(filter(None, (photo["stem"], name, photo["note"]))), "by": [folder]}


def heatmaps(s: Setting, same: dict[str, dict]) -> Iterator[Block]:
    """P3: five photos by the report's methods, the best and the worst photo, shares of attention."""
    photos = {name: {photo["stem"]: photo for photo in page["photos"]} for name, page in same.items()}
    stems = [stem for stem in photos["ours"] if stem in photos["llava"]]
    for stem in stems[:: max(1, len(stems) // 5)][:5]:
        for name in same:
            yield maps(NAMES[name], f"same_{name}", photos[name][stem], (*METHODS, s.method))
    for name in same:
        chosen = read_heatmaps(s.work / f"look_{name}")["photos"]
        for photo in (chosen[0], chosen[-1]):
            yield maps(NAMES[name], f"look_{name}", photo, ("last_mean", s.method))
    if s.drawn:
        (photo,) = read_heatmaps(s.work / "look_photo")["photos"]
        yield maps("the captioner that ships", "look_photo", photo, ("last_mean", "fuse"))
    for name, page in same.items():
        words = [word for photo in page["photos"] for word in photo["words"]]
        if "shares" in words[0]:
            means = np.mean([word["shares"] for word in words], axis=0).T.tolist()  # three parts by layer
            parts = zip(("photo", "caption so far", "first token"), means)
            curves = {part: list(enumerate(shares, 1)) for part, shares in parts}
            yield {"curves": curves, "about": f"Attention in percent by layer, {NAMES[name]}", "by": [f"same_{name}"]}
        else:
            share = 100 * np.mean([word["mass"] for word in words])
            text = (
                f"Of the attention of {NAMES[name]}, {share:.0f}% goes to the photo (mean over words, layers, heads)."
            )
            yield {"finding": text, "by": [f"same_{name}"]}


def grounding(s: Setting, same: dict[str, dict]) -> Iterator[Block]:
    """Likeness of the words' maps beside Match@1, and the grounding scores with their controls."""
    files = {name: s.work / f"ground_{name}/grounding.json" for name in same if s.instances}
    found = {name: read(file) for name, file in files.items()}
    alike = {name: likeness(page["photos"]) for name, page in same.items()}
    rows = [[method] for method in alike["ours"]]
    for row in rows:
        for name in same:
            row += [alike[name][row[0]], found[name]["rows"][row[0]]["match_at_1"]["score"] if found else ""]
    head = ["method", *(f"{what}, {name}" for name in same for what in ("likeness", "Match@1"))]
    about = "How alike the maps of one caption's words are (mean correlation; 1: the same map), beside Match@1"
    yield table(about, head, rows, "same_ours", "same_llava")
    for name, of in alike.items():
        low, high = min(of, key=of.get), max(of, key=of.get)
        text = f"The maps of one caption's words are most alike with {high} ({of[high]:.2f})"
        yield {"finding": f"{NAMES[name]}: {text}, and least with {low} ({of[low]:.2f})."}
    for name, result in found.items():
        rows = [[row, *(scores[metric] for metric in GROUNDING)] for row, scores in result["rows"].items()]
        about = (
            f"{NAMES[name]}: {result['objects']} objects named in {result['photos']} photos; the last rows are controls"
        )
        yield table(about, ["", *GROUNDING], rows, f"ground_{name}")
        for other, metric in (("last_mean", "match_at_1"), ("last_mean", "pointing"), ("centre", "pointing")):
            if change := result.get(f"less_{other}", {}).get(metric):
                yield {"finding": f"{NAMES[name]}: {finding(metric, s.method, other, [change])}"}


def write_report(page: Path, s: Setting, steps: list[Step]) -> None:
    """Write the page of all results."""
    same = {name: read_heatmaps(s.work / f"same_{name}") for name in NAMES}
    done = [[step.name, f"python {step.command}", read_stamp(step).get("seconds", "")] for step in steps]
    sections = {
        "Architecture": architecture(s),
        "P1: captions without training": [{"text": WHY}, *decodings(s, same["llava"]["photos"][0])],
        "P2: training few parameters": training(s),
        "P3: where each word looked": heatmaps(s, same),
        "Do the maps show what the words name?": grounding(s, same),
        "How this page was made": [table("Every step", ["step", "command", "seconds"], done)],
    }
    commands = {str(step.output.relative_to(s.work)): f"python {step.command}" for step in steps}
    data = {"sections": {title: list(blocks) for title, blocks in sections.items()}, "commands": commands}
    write_page(page, "report", "The report", data | {"colours": same["ours"]["colours"]})
