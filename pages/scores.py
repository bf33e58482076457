"""The page of evaluate.py: every photo with its captions, references and scores; a click on a column sorts by it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from data.evaluation import Inputs
from data.photos import BadPhoto, Photo, load_photo
from metrics.table import LABELS, MEANINGS
from pages.page import data_uri, write_page

THUMBNAIL = 112  # px


def _thumbnail(photo: Photo) -> str | None:
    try:
        image = load_photo(photo).image
    except BadPhoto:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return data_uri(image, quality=70)


def write_scores_page(file: Path, inputs: Inputs, results: list[dict[str, Any]]) -> None:
    """Write the page; `results` are the runs' objects of scores.json."""
    metrics = list(results[0]["scored"])
    with ThreadPoolExecutor(2) as pool:
        thumbnails = pool.map(_thumbnail, inputs.photos)
        rows = [
            {
                "stem": photo.stem,
                "thumbnail": thumbnail,
                "captions": [run.captions[photo.stem] for run in inputs.runs],
                "references": inputs.references[photo.stem],
                "scores": [[result["photos"][photo.stem][metric] for metric in metrics] for result in results],
            }
            for photo, thumbnail in zip(inputs.photos, thumbnails)
        ]
    names, corpus = [run.name for run in inputs.runs], [[one["corpus"][name] for name in metrics] for one in results]
    columns, meanings = ([texts[name] for name in metrics] for texts in (LABELS, MEANINGS))
    data = {"runs": names, "columns": columns, "meanings": meanings, "corpus": corpus, "photos": rows}
    write_page(file, "scores", "Scores of " + ", ".join(names), data)
