"""Agreement of captions against pycocoevalcap's CIDEr-D, and the consensus decoding that it chooses by."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import UserError
from models import consensus as module
from models.checkpoint import FREQUENCIES, load_captioner, save_captioner
from models.consensus import Frequencies, agreement, count_frequencies, words_of
from models.decoding import Decoding, check_decoding, photo_seed
from models.vlm import PROMPT, load_vlm

PHOTOS = [
    ["a black dog runs on the grass", "a dog runs", "the black dog is running over green grass", "black dog , grass"],
    ["two men on a red boat", "two men sit in a boat on the water", "a red boat with two men", "men"],
    ["a girl in a pink dress jumps", "a small girl jumps into the air", "the girl is jumping", "girl in pink dress"],
    ["a dog and a girl on the beach", "a girl walks a dog", "dog on a beach", "a dog runs after a girl on the beach"],
    ["", "a red car", "a red car on the road", "a red car"],
]


def most_agreed(captions: list[str], frequencies: Frequencies | None = None) -> int:
    return int(agreement(captions, frequencies).argmax())


def test_it_is_cider_d_of_each_caption_against_the_others(monkeypatch):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    monkeypatch.setattr(module, "RARE", 1)
    for place in range(4):
        others = [own[:place] + own[place + 1 :] for own in PHOTOS]
        frequencies = count_frequencies(others)
        scorer = CiderScorer(n=4, sigma=6.0)
        for own, references in zip(PHOTOS, others):
            scorer.cook_append(" ".join(words_of(own[place])), [" ".join(words_of(text)) for text in references])
        _, expected = scorer.compute_score()
        ours = [agreement(own, frequencies)[place] for own in PHOTOS]
        np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_rare_n_grams_are_not_kept_and_weigh_as_unseen_ones():
    frequencies = count_frequencies([["a dog", "a dog runs"]] * 5 + [["a cat"]] * 4 + [["rain"]])
    assert frequencies == Frequencies(10, {"a": 9, "a dog": 5, "a dog runs": 5, "dog": 5, "dog runs": 5, "runs": 5})
    assert frequencies.weight("a cat") == frequencies.weight("never seen") == pytest.approx(np.log(10))


@pytest.mark.parametrize("frequencies", [None, count_frequencies(PHOTOS * 2)])
def test_the_most_agreed_caption(frequencies):
    captions = ["a red car on a road", "a dog", "a red car", "a red car on the road", "two men"]
    assert captions[most_agreed(captions, frequencies)] in ("a red car on the road", "a red car on a road")
    assert most_agreed(["one", "two"], frequencies) == most_agreed([""], frequencies) == 0
    assert most_agreed(["a kite", "a cat", "a cat"], frequencies) == 1


@pytest.mark.parametrize("decoder", ["gpt2", "llama"])
def test_consensus_decoding_returns_a_candidate_whatever_the_batch(make_captioner, decoder, tmp_path):
    torch.manual_seed(4)
    captioner, features = make_captioner(decoder).eval(), 2 * torch.randn(6, 17, 32)
    captioner.frequencies = count_frequencies(PHOTOS * 2)
    seeds = list(range(6))

    def write(model, decoding: Decoding, own: slice = slice(None), number: int = 0) -> list[list[int]]:
        drawn = [photo_seed(seed, number) if number else seed for seed in seeds[own]]
        return model.generate_from(features[own], {"x": decoding}, {"x": drawn})["x"]

    decoding = Decoding(max_new_tokens=8, temperature=0.3, candidates=4)
    chosen = write(captioner, decoding)
    alone = Decoding(max_new_tokens=8, temperature=0.3, do_sample=True)
    greedy = write(captioner, Decoding(max_new_tokens=8))
    drawn = [greedy] + [write(captioner, alone, number=number) for number in (1, 2, 3)]
    for ids, candidates in zip(chosen, zip(*drawn)):
        assert ids == candidates[most_agreed([captioner.text(one) for one in candidates], captioner.frequencies)]
    assert chosen != greedy
    assert [write(captioner, decoding, slice(i, i + 1))[0] for i in seeds] == chosen
    save_captioner(captioner, tmp_path / "best")
    loaded = load_captioner(tmp_path)
    assert loaded.frequencies == captioner.frequencies and write(loaded, decoding) == chosen
    (tmp_path / "best" / FREQUENCIES).write_text("[]")
    with pytest.raises(UserError, match="document_frequencies.json: expected the number of photos"):
        load_captioner(tmp_path)


def test_consensus_decoding_of_a_vlm_beside_another_decoding(llava_folder, as_photos):
    vlm = load_vlm(str(llava_folder), PROMPT, torch.device("cpu"), torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    photos, seeds = as_photos(list(map(Image.fromarray, pixels))), [5, 6, 7]
    several = Decoding(max_new_tokens=6, candidates=3)
    both = {"best": Decoding(max_new_tokens=6), "agreed": several}
    both = vlm.generate(photos, both, dict.fromkeys(both, seeds))
    alone = Decoding(max_new_tokens=6, do_sample=True)
    drawn = [vlm.generate(photos, {"x": alone}, {"x": [photo_seed(seed, k) for seed in seeds]})["x"] for k in (1, 2)]
    candidates = zip(both["best"], *drawn)
    assert both["agreed"] == [own[most_agreed(list(map(vlm.text, own)))] for own in candidates]
    assert both["best"] == vlm.generate(photos, {"x": Decoding(max_new_tokens=6)}, {"x": seeds})["x"]
    assert vlm.generate(photos[:1], {"x": several}, {"x": seeds[:1]})["x"] == both["agreed"][:1]


def test_candidates_are_sampled_without_beams():
    assert check_decoding("own", Decoding(candidates=3, temperature=0.7, top_p=0.9, top_k=5)) == []
    for other in ({"num_beams": 2}, {"do_sample": True}):
        (problem,) = check_decoding("own", Decoding(candidates=3, **other))
        assert problem == "own.candidates: expected 1 with do_sample or beams, got 3"
