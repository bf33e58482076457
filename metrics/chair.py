"""CHAIR: how much a caption names that is not there (Rohrbach et al. 2018, arXiv:1809.02156). Lower is better.

CHAIRs is the share of captions that name an object which is not in their photo; CHAIRi is the share of such objects
among all that are named. An object is there where COCO's instances or a reference caption have it. Each object counts
once a caption, and the words come from object_words.txt; the paper's code has another list of words, so its figures are
near these and not the same.
"""

import re
from collections.abc import Callable, Iterable

from common.config import NothingDone
from data.instances import Instances
from metrics.object_words import NO_OBJECT, phrases
from metrics.statistics import Score, mean_score


def object_finder(categories: Iterable[str]) -> Callable[[str], set[str]]:
    """A function from a text to those of `categories` that it names. Of words that overlap the longest phrase counts.

    >>> sorted(object_finder(["dog", "hot dog", "bear", "teddy bear", "person"])("A couple of hot dogs, a Teddy bear."))
    ['hot dog', 'teddy bear']
    """
    names = dict.fromkeys(NO_OBJECT)
    for category in categories:
        own = category.lower()
        names |= dict.fromkeys([*phrases(own), own, f"{own}s"], category)
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"\b(?:{'|'.join(longest_first)})\b")
    return lambda text: {names[found] for found in pattern.findall(" ".join(text.lower().split()))} - {None}


def chair(references: dict[str, list[str]], captions: dict[str, str], instances: Instances) -> dict[str, Score]:
    """CHAIRs and CHAIRi of `captions` {photo: caption} as `chair_s` and `chair_i`, from 0 to 1.

    Raises NothingDone where no caption names an object.
    """
    find, parts = object_finder(instances.categories), {}
    for photo, caption in captions.items():
        there, named = set(instances.objects[photo]).union(*map(find, references[photo])), find(caption)
        parts[photo] = (len(named - there), len(named))
    by_object = {photo: absent / named for photo, (absent, named) in parts.items() if named}
    if not by_object:
        raise NothingDone("no caption names an object of the instances file")
    absent, named = map(sum, zip(*parts.values()))
    by_caption = {photo: float(absent > 0) for photo, (absent, _) in parts.items()}
    return {"chair_s": mean_score(by_caption), "chair_i": Score(absent / named, by_object, parts)}
