"""Captioning that survives a kill: every finished photo goes to a journal, the final JSON is written in one step.

`NAME.journal.jsonl` beside the output `NAME.json` holds the run's settings in its first line, then a line
[stem, caption] for each photo. It goes when the output stands.
"""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from common import NothingDone, UserError, check_output
from data.annotations import Photo
from data.images import BadPhoto, load_photos
from data.predictions import write_predictions


class Journal:
    """The captions of one output so far. Raises UserError where it exists, or was begun under other settings."""

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool = False):
        self.output, self.settings = output, json.loads(json.dumps(settings, default=str))
        self.path = output.with_name(output.name.removesuffix(".json") + ".journal.jsonl")
        self.captions: dict[str, str] = {}
        self._whole = 0  # bytes of whole lines
        check_output(output, overwrite or self.path.exists())  # killed between its last two steps, a run has both
        if overwrite:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self._read()

    def _read(self) -> None:
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may have left half a line
        lines, self._whole = whole.decode("utf-8").splitlines(), len(whole)
        if not lines:
            return
        try:
            before, *pairs = map(json.loads, lines)
            self.captions = dict(pairs)
        except (ValueError, TypeError):
            raise UserError(f"output: {self.path} is no journal of captions; --overwrite begins anew") from None
        changed = [key for key in before.keys() | self.settings.keys() if before.get(key) != self.settings.get(key)]
        if changed:
            key = min(changed)
            raise UserError(
                f"output: {self.path} was begun with {key} {before.get(key)}, now {self.settings.get(key)}; "
                "--overwrite begins anew"
            )

    def open(self) -> None:
        """Be ready to append behind the last whole line."""
        self.file = self.path.open("a", encoding="utf-8")
        self.file.truncate(self._whole)
        if not self._whole:
            self._write(self.settings)

    def _write(self, value: Any) -> None:
        self.file.write(json.dumps(value) + "\n")
        self.file.flush()

    def append(self, stem: str, caption: str) -> None:
        if stem not in self.captions:
            self.captions[stem] = caption
            self._write((stem, caption))

    def finish(self, order: Sequence[str], meta: dict[str, Any]) -> None:
        """Write the output, in the photos' `order`, and drop the journal."""
        self.file.close()
        captions = {stem: self.captions[stem] for stem in order if stem in self.captions}
        write_predictions(self.output, captions, self.settings | meta)
        self.path.unlink()


def caption_journaled(
    photos: Sequence[Photo],
    journals: dict[str, Journal],
    caption: Callable[[list[Photo], list[Image.Image]], dict[str, list[str]]],
    batch_size: int,
    workers: int,
) -> list[BadPhoto]:
    """Caption the photos that some journal lacks, `batch_size` at a time; photos are decoded ahead by `workers`.

    `caption` gives for each journal's name the captions of a batch. A photo that cannot be decoded is named on stderr,
    skipped, and returned. Raises NothingDone where no photo could be captioned.
    """
    for journal in journals.values():
        journal.open()
    left = [photo for photo in photos if any(photo.stem not in journal.captions for journal in journals.values())]
    bad: list[BadPhoto] = []
    with tqdm(total=len(photos), initial=len(photos) - len(left), desc="caption", unit="photo") as bar:

        def readable():
            for photo, image in load_photos(left, workers):
                if isinstance(image, BadPhoto):
                    bad.append(image)
                    bar.update()
                    tqdm.write(f"skipped {image}", file=sys.stderr)
                else:
                    yield photo, image

        pairs = readable()
        while batch := list(islice(pairs, batch_size)):
            own = [photo for photo, _ in batch]
            for name, captions in caption(own, [image for _, image in batch]).items():
                for photo, text in zip(own, captions):
                    journals[name].append(photo.stem, text)
            bar.update(len(batch))
    if len(bad) == len(photos):
        raise NothingDone(f"none of {len(photos)} photos could be decoded")
    return bad
