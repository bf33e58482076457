"""BLEU, ROUGE-L, METEOR and CIDEr against published values; what captions and their neighbours may do to scores."""

import string
from pathlib import Path

import pycocoevalcap
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from common.config import NothingDone
from metrics import overlap
from metrics.cider import cider, ptb_tokenize

# The example of CLIPScore's authors (github.com/jmhessel/clipscore, MIT licence) and the scores that they print.
REFERENCES = {
    "image1": [
        "two cats are sleeping next to each other.",
        "a grey cat is cuddling with an orange cat on a blanket.",
        "the orange cat is happy that the black cat is close to it.",
    ],
    "image2": [
        "a dog is wearing ear muffs as it lies on a carpet.",
        "a black dog and an orange cat are looking at the photographer.",
        "headphones are placed on a dogs ears.",
    ],
}
CAPTIONS = {
    "image1": "an orange cat and a grey cat are lying together.",
    "image2": "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
}


def test_published_values():
    found = overlap.bleu(REFERENCES, CAPTIONS)
    assert [round(found[f"bleu{n}"].corpus, 4) for n in (1, 2, 3, 4)] == [0.6667, 0.4899, 0.3469, 0.0]
    assert round(overlap.rouge(REFERENCES, CAPTIONS).corpus, 4) == 0.4280
    assert round(cider(REFERENCES, CAPTIONS)[0], 4) == 0.5637


def test_meteor_of_the_published_example_in_a_land_of_decimal_commas(monkeypatch):
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Duser.language=de -Duser.country=DE")
    score = overlap.meteor(REFERENCES, CAPTIONS)
    assert round(score.corpus, 4) == 0.3444 and list(score.photos) == list(CAPTIONS)


def test_where_meteor_cannot_run_one_line_says_why(monkeypatch):
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", "nowhere.jar")
    with pytest.raises(NothingDone, match="nowhere.jar"):
        overlap.meteor(REFERENCES, CAPTIONS)


def test_nothing_is_written_where_the_scorers_are_installed():
    (folder,) = map(Path, pycocoevalcap.__path__)

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    cider(REFERENCES, CAPTIONS)
    overlap.bleu(REFERENCES, CAPTIONS)
    overlap.rouge(REFERENCES, CAPTIONS)
    assert files() == before


def test_diversity():
    def figures(*captions: str) -> dict[str, float]:
        scores = overlap.diversity({str(number): caption for number, caption in enumerate(captions)})
        assert not any(score.photos or score.of_sums for score in scores.values())  # of the corpus alone
        return {name: score.corpus for name, score in scores.items()}

    found = figures("A dog runs.", "a dog runs", "a cat", "")
    assert found["length"] == 8 / 3 and found["vocabulary"] == 4
    assert found["distinct1"] == 4 / 8 and found["distinct2"] == 3 / 5 and found["unique"] == 2 / 3
    assert figures("") == {"length": 0.0, "vocabulary": 0.0, "distinct1": 0.0, "distinct2": 0.0, "unique": 1.0}


# ------------------------------------------------------------------------------------------- neighbours

FIXED = {f"fixed {n}": caption for n, caption in enumerate((*CAPTIONS.values(), "Two cats.", "A dog on a carpet"))}
GOLD = {name: REFERENCES["image1"] + REFERENCES["image2"] for name in FIXED}
words = st.sampled_from(
    "a the cat dog Mr. Dr. U.S. etc. Inc. a.m. St. No K No. K. ... ' \" `` '' ( ) -LRB- ||| \\ / don't 1,000 3.5 $5 "
    "http://x.y :) <b> &amp; \u00e9 \u4e2d\u6587 \u0627 \N{GRINNING FACE} \u200d \ufeff \x00 \x1b".split(" ")
)
texts = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(words).map(" ".join))


def among(others: list[str]) -> dict[str, str]:
    """The fixed captions with others between them."""
    captions = {}
    for number, other in enumerate(others):
        name = list(FIXED)[number % len(FIXED)]
        captions |= {f"other {number}": other} | ({name: FIXED[name]} if name not in captions else {})
    return captions | {name: caption for name, caption in FIXED.items() if name not in captions}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(texts, min_size=30, max_size=60))
def test_no_caption_changes_the_score_of_another_photo(others):
    captions = among(others)
    gold = {name: GOLD.get(name, ["a cat", "a dog"]) for name in captions}
    alone = among([""] * len(others))
    _, expected = cider(gold, alone)
    _, found = cider(gold, captions)
    assert {name: found[name] for name in FIXED} == {name: expected[name] for name in FIXED}
    one, two = overlap.bleu(gold, alone)["bleu2"].photos, overlap.bleu(gold, captions)["bleu2"].photos
    assert {name: two[name] for name in FIXED} == {name: one[name] for name in FIXED}


def test_the_look_ahead_of_the_tokenizer():
    """Whether `No.` or `K.` at a caption's end keeps its point depends on how the next caption begins."""

    def read(last: str, following: str) -> str:
        return ptb_tokenize({"a": [f"bus {last}"], "b": [following]})["a"][0]

    assert (read("No.", "5 men"), read("No.", "a man")) == ("bus no.", "bus no")
    assert (read("K.", "a man"), read("K.", "A man")) == ("bus k.", "bus k")
    assert read("Co.", "5 men") == read("Co.", "A man") == "bus co."


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.permutations(list(FIXED)), st.sampled_from([str.upper, str.lower, str.title, string.capwords]))
def test_order_and_letter_case_change_no_score(order, case):
    score, by_photo = cider(GOLD, FIXED)
    again, reordered = cider(GOLD, {name: case(FIXED[name]) for name in order})
    assert reordered == by_photo and again == pytest.approx(score, abs=1e-12)
