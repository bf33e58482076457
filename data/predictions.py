"""Predictions: one JSON object {photo stem: caption}, and beside it NAME.meta.json, which says how they were made.

Other programs write them as COCO's results, JSON lines or tables, and name photos by their ids or files: these are
read too.
"""

from pathlib import Path
from typing import Any

from common.config import check
from common.files import write_json
from data.forms import EXPECTED, read_contents


def read_predictions(path: Path) -> dict[str, str]:
    """The captions in `path` by photo as it names them, in the file's order; a caption may be empty, null is none.

    Raises UserError for a file of no known form, for two captions of a photo, and for a caption that is not text or
    holds a lone surrogate (half a UTF-16 pair, which no tokenizer takes).
    """
    expected = f"one JSON object {{photo stem: caption}}, {EXPECTED}"
    captions = read_contents(path, exact=True, expected=expected).captions
    check([f"{path}: {name!r} has {len(own)} captions" for name, own in captions.items() if len(own) > 1])
    return {name: own[0] for name, own in captions.items() if own}


def write_predictions(path: Path, captions: dict[str, str], meta: dict[str, Any]) -> None:
    """Write `captions` in their order to `path` and `meta` to `meta_path(path)`, each in one atomic step."""
    write_json(meta_path(path), meta)
    write_json(path, captions)


def meta_path(path: Path) -> Path:
    """Where the account of the predictions in `path` stands: `NAME.meta.json` for `NAME.json`."""
    return path.with_name(path.name.removesuffix(".json") + ".meta.json")
