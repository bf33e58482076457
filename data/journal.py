"""Captioning that survives a kill: every finished photo goes to a journal, the outputs are written when all are done.

`NAME.journal.jsonl` beside the output `NAME.json` holds the run's settings in its first line, then for each photo a
line [stem, {name of the decoding: caption}]. It is deleted when the outputs have been written.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import UserError, flatten
from common.files import JsonLines, check_output, lock
from data.photos import BadPhoto, LoadedPhoto, Photo
from data.predictions import write_predictions


class Journal:
    """The captions of one run so far, by one decoding or several.

    `settings` {name of the decoding: what its captions are made with} go into the meta files. The predictions of a
    single decoding go to `output`, of several to NAME.DECODING.json each. Raises UserError where an output exists, or
    where the run was begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, dict[str, Any]], overwrite: bool = False):
        self.start, stem = time.monotonic(), output.name.removesuffix(".json")
        self.settings = json.loads(json.dumps(settings, default=str))
        several = len(settings) > 1
        self.outputs = {name: output.with_name(f"{stem}.{name}.json") if several else output for name in settings}
        self.file = JsonLines(output.with_name(f"{stem}.journal.jsonl"))
        self.captions: dict[str, dict[str, str]] = {}
        """{stem: {name of the decoding: caption}}"""
        check_output(self.file.path, overwrite=True)
        self.unlock = lock(output)
        if overwrite:
            self.file.path.unlink(missing_ok=True)
        self._read()
        for path in self.outputs.values():  # a run killed between its last two steps leaves both journal and output
            check_output(path, overwrite or bool(self.captions))

    def _read(self) -> None:
        try:
            before, *photos = self.file.rows() or [self.settings]
            self.captions = {stem: {name: "" + captions[name] for name in before} for stem, captions in photos}
            changed = _changed(before, self.settings)
        except (UserError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"output: {self.file.path} is no journal of captions; --overwrite begins anew") from None
        if changed:
            raise UserError(f"output: {self.file.path} was begun with {changed}; --overwrite begins anew")

    @property
    def done(self) -> int:
        """How many photos have their captions."""
        return len(self.captions)

    def missing(self, photos: Sequence[Photo]) -> list[Photo]:
        """Those of `photos` that have no captions yet."""
        return [photo for photo in photos if photo.stem not in self.captions]

    def append(self, batch: Sequence[LoadedPhoto], captions: dict[str, list[str]]) -> None:
        """Keep the captions of a batch: for each decoding a list, a caption a photo."""
        if not self.captions and not self.file.rows():
            self.file.append(self.settings)
        for i, loaded in enumerate(batch):
            self.captions[loaded.stem] = {name: captions[name][i] for name in self.settings}
            self.file.append([loaded.stem, self.captions[loaded.stem]])

    def finish(self, photos: Sequence[Photo], bad: Sequence[BadPhoto], meta: dict[str, Any]) -> None:
        """Write the outputs in the order of `photos`, and delete the journal.

        The meta files get the settings, `meta`, the seconds since the journal was made, and the `bad` photos with
        their reasons.
        """
        skipped = {error.path.name: error.reason for error in bad}
        meta = meta | {"seconds": round(time.monotonic() - self.start, 2), "skipped": skipped}
        stems = [photo.stem for photo in photos if photo.stem in self.captions]
        for name, path in self.outputs.items():
            write_predictions(path, {stem: self.captions[stem][name] for stem in stems}, self.settings[name] | meta)
            print(f"{len(stems)} captions in {path}")
        self.file.path.unlink(missing_ok=True)
        self.unlock()
        if skipped:
            print(f"{len(skipped)} photo{'s' * (len(skipped) > 1)} skipped: {', '.join(skipped)}")


def _changed(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> str:
    """The first setting that differs, as `KEY OLD, now NEW`; empty where none does."""
    if before.keys() != now.keys():
        return f"decoding {' '.join(before)}, now {' '.join(now)}"
    old, new = flatten(before), flatten(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return "".join(f"{key.partition('.')[2]} {old.get(key)}, now {new.get(key)}" for key in changed[:1])
