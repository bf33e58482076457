"""The page of evaluate.py: every photo with its captions, references and scores, sortable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data.evaluation import Predicted
from data.photos import BadPhoto, Photo, load_photos
from pages.page import data_uri, write_page

THUMBNAIL = 112  # px


def _thumbnails(photos: Sequence[Photo]) -> dict[str, str]:
    thumbnails = {}
    for photo, image in load_photos([photo for photo in photos if photo.path is not None]):
        if not isinstance(image, BadPhoto):
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
            thumbnails[photo.stem] = data_uri(image, quality=70)
    return thumbnails


def write_scores_page(
    file: Path,
    photos: Sequence[Photo],
    references: dict[str, list[str]],
    runs: Sequence[Predicted],
    results: Sequence[dict[str, Any]],
    columns: dict[str, str],
) -> None:
    """Write the page; `results` are the runs' objects as in scores.json, `columns` {metric: label} are shown."""
    thumbnails = _thumbnails(photos)
    rows = [
        {
            "stem": photo.stem,
            "thumbnail": thumbnails.get(photo.stem),
            "captions": [run.captions[photo.stem] for run in runs],
            "references": references[photo.stem],
            "scores": [[result["photos"][photo.stem].get(metric) for metric in columns] for result in results],
        }
        for photo in photos
    ]
    data = {
        "runs": [run.name for run in runs],
        "columns": list(columns.values()),
        "corpus": [[result["corpus"][metric] for metric in columns] for result in results],
        "idf": results[0]["idf"],
        "photos": rows,
    }
    write_page(file, "scores", "Scores of " + ", ".join(run.name for run in runs), data)
