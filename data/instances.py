"""Masks of the objects in photos, from COCO's instances files (polygons or run lengths)."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError, check
from common.files import read_text

EXPECTED = "COCO instances: images, categories and annotations with a segmentation each"


@dataclass(frozen=True)
class Instances:
    """The objects of the photos of one file, decoded as they are asked for."""

    path: Path
    sizes: dict[str, tuple[int, int]]
    """(height, width) by photo stem."""
    objects: dict[str, dict[str, list]]
    """Segmentations by photo stem, then by category."""
    categories: list[str]

    def masks(self, stem: str) -> dict[str, np.ndarray]:
        """{category: (H, W) bool, True on any object of it} of a photo; empty where the file does not know it."""
        from pycocotools import mask as run_lengths

        found = {}
        for name, segmentations in self.objects.get(stem, {}).items():
            lengths = []
            for one in segmentations:
                if isinstance(one, list) or isinstance(one["counts"], list):
                    one = run_lengths.frPyObjects(one, *self.sizes[stem])
                lengths += one if isinstance(one, list) else [one]
            found[name] = run_lengths.decode(run_lengths.merge(lengths)).astype(bool)
        return found


def read_instances(path: Path) -> Instances:
    """Read an instances file. Raises UserError where it is not one, naming what is wrong."""
    try:
        content = json.loads(read_text(path, EXPECTED))
        names = {category["id"]: category["name"] for category in content["categories"]}
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        sizes = {stems[image["id"]]: (image["height"], image["width"]) for image in content["images"]}
        objects: dict[str, dict[str, list]] = {stem: {} for stem in sizes}
        for annotation in content["annotations"]:
            stem, shape = stems[annotation["image_id"]], annotation["segmentation"]
            if not _is_segmentation(shape, sizes[stem]):
                expected = "polygons of three corners or more, or run lengths of the photo's size"
                where = f"segmentation of annotation {annotation.get('id')}"
                raise UserError(f"instances: {path}: {where} is {shape!r:.60}; expected {expected}")
            objects[stem].setdefault(names[annotation["category_id"]], []).append(shape)
    except (ValueError, RecursionError) as error:
        raise UserError(f"instances: {path}: not JSON ({error}); expected {EXPECTED}") from None
    except KeyError as error:
        raise UserError(f"instances: {path}: {error} is missing or unknown; expected {EXPECTED}") from None
    except (TypeError, AttributeError):
        raise UserError(f"instances: {path}: expected {EXPECTED}") from None
    twice = [stem for stem, count in Counter(stems.values()).items() if count > 1]
    check([f"instances: {path}: two photos with the stem {stem!r}" for stem in twice])
    check([f"instances: {path}: no photos in it"] * (not objects))
    return Instances(path, sizes, objects, list(names.values()))


def _is_segmentation(shape: Any, size: tuple[int, int]) -> bool:
    if isinstance(shape, dict):
        return isinstance(shape.get("counts"), (str, list)) and tuple(shape.get("size") or ()) == size
    corners = isinstance(shape, list) and shape and all(isinstance(one, list) and len(one) >= 6 for one in shape)
    return bool(corners) and all(isinstance(number, (int, float)) for one in shape for number in one)
