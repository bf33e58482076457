"""Predictions: one JSON object {photo stem: caption}, and beside it NAME.meta.json, which says how they were made.

Other programs write them as COCO's results, JSON lines or tables, and name photos by their ids or files: these are
read too.
"""

from pathlib import Path
from typing import Any

from common.config import UserError, check
from common.files import read_text, write_json
from data.forms import Contents, column_mark, has_name, json_rows, object_rows, parse, records, table_rows

EXPECTED = "one JSON object {photo stem: caption}, or JSON records or a table of image and caption"


def _several(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which a key that stands there twice has both values: a dict would keep only the last caption."""
    merged = dict(pairs)
    return (
        merged if len(merged) == len(pairs) else {key: [value for one, value in pairs if one == key] for key in merged}
    )


def read_predictions(path: Path) -> dict[str, str]:
    """The captions in `path` by photo as it names them, in the file's order; a caption may be empty, null is none.

    Raises UserError for a file of no known form, for two captions of a photo, and for a caption that is not text or
    holds a lone surrogate (half a UTF-16 pair, which no tokenizer takes).
    """
    content = parse(path, read_text(path, EXPECTED), EXPECTED, object_pairs_hook=_several)
    contents = Contents(exact=True)
    if column_mark(content):
        contents.read(table_rows(content))
    elif isinstance(content, dict) and not records(content):
        contents.read(object_rows(content))
    elif has_name(content) or isinstance(content, dict):
        contents.read(json_rows(content))
    else:
        kind = "text that is not JSON" if isinstance(content, str) else f"a {type(content).__name__}"
        raise UserError(f"{path}: holds {kind}; expected {EXPECTED}")
    several = [name for name, captions in contents.captions.items() if len(captions) > 1]
    faults = contents.faults + [f"{name!r} stands there twice, or has several captions" for name in several]
    check([f"{path}: {fault}" for fault in faults[:1]] + faults[1:])
    return {name: captions[0] for name, captions in contents.captions.items() if captions}


def write_predictions(path: Path, captions: dict[str, str], meta: dict[str, Any]) -> None:
    """Write `captions` in their order to `path` and `meta` to `meta_path(path)`, each in one atomic step."""
    write_json(meta_path(path), meta)
    write_json(path, captions)


def meta_path(path: Path) -> Path:
    """Where the account of the predictions in `path` stands: `NAME.meta.json` for `NAME.json`."""
    return path.with_name(path.name.removesuffix(".json") + ".meta.json")
