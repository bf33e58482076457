"""Words by which captions name COCO's 80 categories; they stand in object_words.txt, one category a line.

A category that the file does not list is named by its own name and the plural. A word with several senses (glass,
bat, plant) belongs to the category that captions mean most often. Phrases, with _ for spaces, that hold such a word and
name no object (a couple of, train track) stand in the last line.
"""

from pathlib import Path

_LINES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
SYNONYMS = {category: words.split() for category, words in (line.split(": ") for line in _LINES)}
NO_OBJECT = [phrase.replace("_", " ") for phrase in SYNONYMS.pop("no object")]


def phrases(category: str) -> list[str]:
    """Lower-case words or phrases that name a category.

    >>> phrases("zebra"), phrases("red circle"), phrases("Couch")
    (['zebra', 'zebras'], ['red circle', 'red circles'], ['couch', 'couches', 'sofa', 'sofas'])
    """
    category = category.lower()
    return SYNONYMS.get(category, [category, f"{category}s"])
