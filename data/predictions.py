"""Predictions: one JSON object {photo stem: caption}, and beside it NAME.meta.json, which says how they were made.

Other programs write them as COCO's results, JSON lines or tables, and name photos by their ids or files: these are
read too.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from common.config import check
from common.files import write_json
from data.forms import read_contents


def read_predictions(path: Path) -> dict[str, str]:
    """The captions in `path` by photo as it names them, in the file's order; a caption may be empty, null is none.

    Raises UserError for a file of no known form, for two captions of a photo, and for a caption that is not text or
    holds a lone surrogate (half a UTF-16 pair, which no tokenizer takes).
    """
    captions = read_contents(path, exact=True).captions
    check([f"{path}: {name!r} has {len(own)} captions" for name, own in captions.items() if len(own) > 1])
    return {name: own[0] for name, own in captions.items() if own}


def wrong_in_form(captions: dict[str, str], cut: frozenset[str] = frozenset()) -> dict[str, list[str]]:
    """Stems of the captions {stem: caption} that are empty, in `cut` (at the last allowed token), or repeat themselves.

    A caption repeats itself where the same four words stand in it three times or more, whatever their case.

    >>> wrong_in_form({"a": " ", "b": "A dog and a dog and a dog and a dog", "c": "a dog on"}, frozenset("c"))
    {'empty': ['a'], 'cut': ['c'], 'repeating': ['b']}
    """
    words = {stem: caption.lower().split() for stem, caption in captions.items()}
    counts = {stem: Counter(zip(own, own[1:], own[2:], own[3:])) for stem, own in words.items()}
    return {
        "empty": [stem for stem, own in words.items() if not own],
        "cut": [stem for stem in captions if stem in cut],
        "repeating": [stem for stem, grams in counts.items() if max(grams.values(), default=0) >= 3],
    }


def write_predictions(path: Path, captions: dict[str, str], meta: dict[str, Any]) -> None:
    """Write `captions` in their order to `path` and `meta` to `meta_path(path)`, each in one atomic step."""
    write_json(meta_path(path), meta)
    write_json(path, captions)


def meta_path(path: Path) -> Path:
    """Where the account of the predictions in `path` stands: `NAME.meta.json` for `NAME.json`."""
    return path.with_name(path.name.removesuffix(".json") + ".meta.json")
