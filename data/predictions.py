"""Predictions: one JSON object {photo stem: caption}, and beside it NAME.meta.json, which says how they were made."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.config import UserError, check
from common.files import write_json
from data.annotations import is_unicode, read_text


def read_predictions(path: Path) -> dict[str, str]:
    """The captions in `path` by photo stem, in the file's order; a caption may be empty.

    Raises UserError for a file that is not one JSON object, for a stem that stands there twice, and for a caption
    that is not text or holds a lone surrogate (half a UTF-16 pair, which no tokenizer takes).
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return found

    expected = "expected one JSON object {photo stem: caption}"
    try:
        captions = json.loads(read_text(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {expected}") from None
    if not isinstance(captions, dict):
        raise UserError(f"{path}: holds a {type(captions).__name__}; {expected}")
    check([f"{path}: stem {stem!r} stands there twice" for stem in twice])
    check(
        [
            f"{path}: caption of {stem!r} is {caption!r:.60}, expected text"
            for stem, caption in captions.items()
            if not isinstance(caption, str)
        ]
    )
    check(
        [
            f"{path}: entry {stem!r} holds a lone surrogate, which is no Unicode text"
            for stem, caption in captions.items()
            if not is_unicode(stem + caption)
        ]
    )
    return captions


def write_predictions(path: Path, captions: dict[str, str], meta: dict[str, Any]) -> None:
    """Write `captions` in their order to `path` and `meta` to `meta_path(path)`, each in one atomic step."""
    write_json(meta_path(path), meta)
    write_json(path, captions)


def meta_path(path: Path) -> Path:
    """Where the account of the predictions in `path` stands: `NAME.meta.json` for `NAME.json`."""
    return path.with_name(path.name.removesuffix(".json") + ".meta.json")
