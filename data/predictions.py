"""Predictions: one JSON object {photo stem: caption}, and beside it NAME.meta.json, which says how they were made."""

from collections import Counter
from pathlib import Path
from typing import Any

from common.config import UserError, check
from common.files import read_text, write_json
from data.forms import is_unicode, parse

EXPECTED = "one JSON object {photo stem: caption}"


def read_predictions(path: Path) -> dict[str, str]:
    """The captions in `path` by photo stem, in the file's order; a caption may be empty.

    Raises UserError for a file that is not one JSON object, for a stem that stands there twice, and for a caption
    that is not text or holds a lone surrogate (half a UTF-16 pair, which no tokenizer takes).
    """
    # an object as a tuple of its pairs, since a dict would keep only the last caption of a stem
    pairs = parse(path, read_text(path), EXPECTED, object_pairs_hook=tuple)
    if not isinstance(pairs, tuple):
        kind = "text that is not JSON" if isinstance(pairs, str) else f"a {type(pairs).__name__}"
        raise UserError(f"{path}: holds {kind}; expected {EXPECTED}")
    captions, counts = dict(pairs), Counter(stem for stem, _ in pairs)
    check([f"{path}: stem {stem!r} stands there twice" for stem, count in counts.items() if count > 1])
    no_text = [stem for stem, caption in captions.items() if not isinstance(caption, str)]
    check([f"{path}: caption of {stem!r} is {captions[stem]!r:.60}, expected text" for stem in no_text])
    broken = [stem for stem, caption in captions.items() if not is_unicode(stem + caption)]
    check([f"{path}: entry {stem!r} holds half a surrogate pair, which is no Unicode text" for stem in broken])
    return captions


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
