"""Captioning that survives a kill: every finished photo goes to a journal, the outputs are written when all are done.

`NAME.journal.jsonl` beside the output `NAME.json` holds the run's settings in its first line, then for each photo a
line [stem, {name of the decoding: caption}]. It goes when the outputs stand.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from common.config import NothingDone, UserError
from common.files import check_output
from data.photos import BadPhoto, Photo, load_photos
from data.predictions import write_predictions


class Journal:
    """The captions of one run so far, of one decoding or several.

    `outputs` are the predictions files by the name of the decoding, `settings` what each was made with. Raises
    UserError where an output exists, or the run was begun under other settings.
    """

    def __init__(
        self, output: Path, outputs: dict[str, Path], settings: dict[str, dict[str, Any]], overwrite: bool = False
    ):
        self.path = output.with_name(output.name.removesuffix(".json") + ".journal.jsonl")
        self.outputs, self.settings = outputs, json.loads(json.dumps(settings, default=str))
        self.captions: dict[str, dict[str, str]] = {}  # by stem, then by name
        self._whole = 0  # bytes of whole lines
        if self.path.exists() and not overwrite:
            self._read()
        for file in outputs.values():  # killed between its last two steps, a run has both journal and output
            check_output(file, overwrite or self._whole > 0)
        if overwrite:
            self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may have left half a line
        if not whole:
            return
        try:
            lines = whole.decode("utf-8").splitlines()
            before, *photos = map(json.loads, lines)
            self.captions = {stem: {name: captions[name] for name in before} for stem, captions in photos}
            changed = _changed(before, self.settings)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"output: {self.path} is no journal of captions; --overwrite begins anew") from None
        if changed:
            raise UserError(f"output: {self.path} was begun with {changed}; --overwrite begins anew")
        self._whole = len(whole)

    def open(self) -> None:
        """Be ready to append behind the last whole line."""
        self._file = self.path.open("a", encoding="utf-8")
        self._file.truncate(self._whole)
        if not self._whole:
            self._write(self.settings)

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def append(self, stem: str, captions: dict[str, str]) -> None:
        """Keep the captions of one photo, by name."""
        self.captions[stem] = captions
        self._write((stem, captions))

    def finish(self, order: Sequence[str], meta: dict[str, Any]) -> None:
        """Write the outputs, in the photos' `order`, and drop the journal."""
        self._file.close()
        done = [stem for stem in order if stem in self.captions]
        for name, file in self.outputs.items():
            captions = {stem: self.captions[stem][name] for stem in done}
            write_predictions(file, captions, self.settings[name] | meta)
            print(f"{len(captions)} captions in {file}")
        self.path.unlink()


def _changed(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> str:
    """The first setting that differs, as `KEY OLD, now NEW`; empty where none does."""
    if before.keys() != now.keys():
        return f"decoding {' '.join(before)}, now {' '.join(now)}"
    for name in now:
        for key in sorted(before[name].keys() | now[name].keys()):
            if before[name].get(key) != now[name].get(key):
                return f"{key} {before[name].get(key)}, now {now[name].get(key)}"
    return ""


def caption_journaled(
    photos: Sequence[Photo],
    journal: Journal,
    caption: Callable[[list[Photo], list[Image.Image]], dict[str, list[str]]],
    batch_size: int,
    workers: int,
    meta: dict[str, Any],
) -> None:
    """Caption the photos that the journal lacks, `batch_size` at a time, and write the outputs.

    `caption` gives for each name of the journal the captions of a batch; photos are decoded ahead by `workers`. A photo
    that cannot be decoded is named on stderr, skipped and counted. `meta` goes beside the outputs with the seconds
    that this took and the photos skipped. Raises NothingDone where no photo could be captioned.
    """
    start = time.monotonic()
    journal.open()
    left = [photo for photo in photos if photo.stem not in journal.captions]
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
            named = caption(own, [image for _, image in batch])
            for i, photo in enumerate(own):
                journal.append(photo.stem, {name: captions[i] for name, captions in named.items()})
            bar.update(len(batch))
    if len(bad) == len(photos):
        journal.path.unlink()
        raise NothingDone(f"none of {len(photos)} photos could be decoded")
    skipped = {error.path.name: error.reason for error in bad}
    journal.finish(
        [photo.stem for photo in photos], meta | {"seconds": round(time.monotonic() - start, 2), "skipped": skipped}
    )
    if bad:
        print(f"{len(bad)} photo{'s' * (len(bad) > 1)} skipped: {', '.join(skipped)}")
