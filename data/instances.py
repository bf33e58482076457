"""Masks of the objects in photos, from COCO's instances files (polygons or run lengths)."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO

from common.config import UserError
from common.files import read_text
from data.forms import parse

EXPECTED = "COCO instances: images, categories and annotations with a segmentation each"


@dataclass(frozen=True)
class Instances:
    """The objects of the photos of one file, decoded as they are asked for."""

    coco: COCO
    sizes: dict[str, tuple[int, int]]
    """(height, width) by photo stem."""
    objects: dict[str, dict[str, list[dict]]]
    """Annotations by photo stem, then by category."""
    categories: list[str]

    def masks(self, stem: str) -> dict[str, np.ndarray]:
        """{category: (H, W) bool, True on any object of it} of a photo; empty where the file does not know it."""
        return {
            name: np.any([self.coco.annToMask(one) for one in annotations], axis=0)
            for name, annotations in self.objects.get(stem, {}).items()
        }


def read_instances(path: Path) -> Instances:
    """Read an instances file. Raises UserError where it is not one, naming what is wrong."""
    try:
        content = parse(f"instances: {path}", read_text(path, EXPECTED), EXPECTED)
        names = {category["id"]: category["name"] for category in content["categories"]}
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        sizes = {stems[image["id"]]: (image["height"], image["width"]) for image in content["images"]}
        objects: dict[str, dict[str, list[dict]]] = {stem: {} for stem in sizes}
        for annotation in content["annotations"]:
            stem, shape = stems[annotation["image_id"]], annotation["segmentation"]
            if not _is_segmentation(shape, sizes[stem]):
                expected = "polygons of three corners or more, or run lengths of the photo's size"
                where = f"segmentation of annotation {annotation.get('id')}"
                raise UserError(f"instances: {path}: {where} is {shape!r:.60}; expected {expected}")
            objects[stem].setdefault(names[annotation["category_id"]], []).append(annotation)
    except (KeyError, TypeError, AttributeError) as error:
        missing = f"{error} is missing or unknown; " * isinstance(error, KeyError)
        raise UserError(f"instances: {path}: {missing}expected {EXPECTED}") from None
    if len(sizes) < len(stems):
        raise UserError(f"instances: {path}: {len(stems)} photos have only {len(sizes)} different stems, their keys")
    coco = COCO()
    coco.imgs = {image["id"]: image for image in content["images"]}  # all that it needs for masks
    return Instances(coco, sizes, objects, list(names.values()))


def _is_segmentation(shape: Any, size: tuple[int, int]) -> bool:
    """Whether pycocotools can draw it: of polygons its C code reads and writes without looking."""
    with suppress(Exception):  # such as pycocotools raises
        if isinstance(shape, dict):
            runs = mask.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
            counts = runs["counts"] if isinstance(runs["counts"], bytes) else runs["counts"].encode()
            again = mask.encode(np.asfortranarray(mask.decode(runs)))  # with runs too short, the rest is other memory
            return tuple(shape["size"]) == size and again["counts"] == counts
        corners = [np.reshape(np.asarray(polygon, float), (-1, 2)) for polygon in shape]
        return min(map(len, corners)) > 2 and np.abs(np.concatenate(corners)).max() <= 2 * max(size)
    return False
