"""The steps of the report, from report/steps.yaml, where a reader sees them at a glance."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml
from matplotlib import get_data_path

DECODINGS = ("best", "moderate", "diverse")
PHOTO = Path(get_data_path()) / "sample_data/grace_hopper.jpg"  # a portrait by the U.S. Navy, in the public domain
SHIPPED = Path("checkpoints/flickr8k")


def quoted(*paths: object) -> str:
    """Paths as a command line takes them."""
    return shlex.join(map(str, paths))


@dataclass(frozen=True)
class Setting:
    """What the report is about: the models, the data, and where the results go."""

    work: Path
    """Folder of all results but the page."""
    data: Path
    """Folder with train.json, val.json and images/."""
    model: str
    """The vision-language model."""
    captioner: Path
    """Config of our captioner, the one that P2 and P3 show."""
    configs: tuple[Path, ...]
    """Configs that are compared."""
    seeds: int
    """How often each of them is trained."""
    instances: Path | None
    """Masks of the validation photos."""
    method: str
    """P3's method."""
    flags: dict[str, str]
    """More flags, by their names in steps.yaml: `clip`, and for small drawn scenes `train`, `scenes` and `steps`."""
    limit: int | None = None
    """Only so many validation photos."""
    drawn: bool = False

    @property
    def few(self) -> int:
        """How many photos are taken for what costs more or is only looked at."""
        return min(20, self.limit or 20)

    def run(self, config: Path, seed: int) -> Path:
        """The run folder of a config."""
        return self.work / ("p2" if (config, seed) == (self.captioner, 0) else f"{config.stem}_{seed}")

    def captions(self, run: Path) -> Path:
        """The predictions of a run."""
        return self.work / ("val.json" if run.name == "p2" else f"{run.name}.json")

    def values(self) -> dict[str, str]:
        """What fills the names in braces of every step."""
        paths = {"val": self.data / "val.json", "photo": PHOTO, "shipped": SHIPPED, **vars(self)}
        text = {name: quoted(path) for name, path in paths.items()}
        text |= {"masks": f" --instances {text['instances']}" if self.instances else ""}
        text |= {"checkpoints": quoted(self.work / "p2", *(self.run(config, 0) for config in self.configs))}
        text |= {"limit": f" --limit {self.limit}" if self.limit else "", "few": str(self.few)}
        return text | {"clip": "", "train": "", "scenes": "", "steps": "", **self.flags}

    def each(self) -> dict[str, list[dict[str, str]]]:
        """What fills the names in braces of the steps that are repeated for each run or seed of training."""
        runs, seeds = [], []
        for seed in range(self.seeds):
            folders = {config: self.run(config, seed) for config in self.configs}
            seeds.append({"seed": str(seed), "files": quoted(*map(self.captions, folders.values()))})
            for config, folder in folders.items():
                run = {"config": quoted(config), "seed": str(seed), "run": quoted(folder)}
                runs += [run | {"name": f"{config.stem}, seed {seed}"}] if folder.name != "p2" else []
        return {"runs": runs, "seeds": seeds}


@dataclass(frozen=True)
class Step:
    """One command; `command` is what stands behind `python`."""

    name: str
    command: str
    needs: tuple[Path, ...] = ()
    """Files and folders that decide the result."""
    makes: tuple[Path, ...] = ()
    """Files that are there when it is done; without them what `--output` names."""

    @property
    def output(self) -> Path:
        """What `--output` of the command names."""
        words = shlex.split(self.command)
        return Path(words[words.index("--output") + 1])


def make_steps(s: Setting, parts: tuple[str, ...]) -> list[Step]:
    """The steps of these parts of steps.yaml."""
    written = yaml.safe_load(Path(__file__).with_name("steps.yaml").read_text(encoding="utf-8"))
    values, steps = s.values(), []
    there = {"drawn": s.drawn, "masks": s.instances is not None, None: True}
    for one in (one for part in parts for one in written[part] if there[one.get("only")]):
        for own in (written | s.each()).get(one.get("each"), [{}]):
            own = {key: text.format_map(values) for key, text in own.items()}
            filled = {key: one.get(key, "").format_map(values | own) for key in ("name", "command", "needs", "makes")}
            paths = (tuple(map(Path, shlex.split(filled[key]))) for key in ("needs", "makes"))
            steps.append(Step(filled["name"], filled["command"], *paths))
    return steps
