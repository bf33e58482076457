"""Captioning that survives a kill: every finished photo goes to a journal, the outputs are written when all are done.

`NAME.journal.jsonl` beside the output `NAME.json` holds the run's settings in its first line, then for each photo a
line [stem, {name of the decoding: [caption, whether it was cut]}, hash of the photo's file]. It is deleted when the
outputs have been written.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.config import UserError, changes, check, one_line
from common.files import JsonLines, check_output, lock
from data.photos import BadPhoto, LoadedPhoto, Photo, key_of
from data.predictions import write_predictions, wrong_in_form


def check_unchanged(journal: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a UserError where the settings in a `journal` are not those of this run."""
    hint = f"{journal} was begun with other settings, --overwrite begins anew"
    check([f"output: {hint}: {key} {change}" for key, change in changes(before, now).items()], shown=1)


class PhotoRows:
    """What is known of each photo so far, kept in the file `path` by a run that may be killed.

    `settings` stand in its first line. A row belongs to a photo's file, and to what else the caller takes `about` it.
    Raises UserError where the file was begun with other settings; `overwrite` begins anew.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.file, settings = JsonLines(path), json.loads(json.dumps(settings, default=str))
        if overwrite:
            path.unlink(missing_ok=True)
        try:
            before, *rows = self.file.rows() or [settings]
            self.rows = {stem: (about, row) for stem, about, row in rows}
            check_unchanged(path, before, settings)
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"output: {path} is no file of this command; --overwrite begins anew") from None
        if not path.exists():
            self.file.append(settings)

    def get(self, photo: Photo, about: list) -> Any:
        """The row of a photo; None where it has none, or one of another file or about something else."""
        known, row = self.rows.get(photo.stem, (None, None))
        return row if known and known == [key_of(photo), *about] else None

    def append(self, loaded: LoadedPhoto, about: list, row: Any) -> None:
        self.file.append([loaded.stem, [loaded.key, *about], row])


class Journal:
    """The captions of one run so far, by one decoding or several.

    `settings` {name of the decoding: what its captions are made with} go into the meta files; `decoding` in them is a
    `models.decoding.Decoding` as a dictionary. The predictions of a single decoding go to `output`, of several to
    NAME.DECODING.json each. Raises UserError where an output exists, or where the run was begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, dict[str, Any]], overwrite: bool = False):
        self.start, stem = time.monotonic(), output.name.removesuffix(".json")
        self.settings = json.loads(json.dumps(settings, default=str))
        several = len(settings) > 1
        self.outputs = {name: output.with_name(f"{stem}.{name}.json") if several else output for name in settings}
        self.file = JsonLines(output.with_name(f"{stem}.journal.jsonl"))
        self.captions: dict[str, dict[str, tuple[str, bool]]] = {}
        """{stem: {name of the decoding: (caption, whether it ended at the last allowed token)}}"""
        self.keys: dict[str, str] = {}
        """{stem: hash of the file that was captioned}"""
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
            for stem, found, self.keys[stem] in photos:
                self.captions[stem] = {name: ("" + found[name][0], bool(found[name][1])) for name in before}
            old, new = ({"decoding": list(settings)} | settings for settings in (before, self.settings))
        except (UserError, ValueError, TypeError, LookupError, AttributeError):
            raise UserError(f"output: {self.file.path} is no journal of captions; --overwrite begins anew") from None
        check_unchanged(self.file.path, old, new)

    def missing(self, photos: Sequence[Photo]) -> list[Photo]:
        """Those of `photos` that have no captions yet, or whose file is another one than was captioned."""
        known = [photo for photo in photos if photo.stem in self.captions]
        self.captions = {one.stem: self.captions[one.stem] for one in known if self.keys[one.stem] == key_of(one)}
        return [photo for photo in photos if photo.stem not in self.captions]

    def append(
        self, batch: Sequence[LoadedPhoto], captions: dict[str, list[list[int]]], text: Callable[[list[int]], str]
    ) -> None:
        """Keep the captions of a batch, for each decoding a list with the token ids of a caption a photo.

        `text` turns token ids into a caption. One of as many tokens as its decoding allows was cut.
        """
        if not self.captions and not self.file.rows():
            self.file.append(self.settings)
        limits = {name: one["decoding"]["max_new_tokens"] for name, one in self.settings.items()}
        for i, loaded in enumerate(batch):
            ids = {name: captions[name][i] for name in limits}
            self.captions[loaded.stem] = {name: (text(ids[name]), len(ids[name]) == limits[name]) for name in limits}
            self.keys[loaded.stem] = loaded.key
            self.file.append([loaded.stem, self.captions[loaded.stem], loaded.key])

    def finish(self, photos: Sequence[Photo], bad: Sequence[BadPhoto], meta: dict[str, Any]) -> None:
        """Write the outputs in the order of `photos`, and delete the journal.

        The meta files get the settings, `meta`, the seconds since the journal was made, the `bad` photos with their
        reasons, and the captions that are wrong in form.
        """
        skipped = {error.path.name: error.reason for error in bad}
        meta = meta | {"seconds": round(time.monotonic() - self.start, 2), "skipped": skipped}
        stems = [photo.stem for photo in photos if photo.stem in self.captions]
        for name, path in self.outputs.items():
            captions = {stem: self.captions[stem][name][0] for stem in stems}
            form = wrong_in_form(captions, cut=frozenset(stem for stem in stems if self.captions[stem][name][1]))
            write_predictions(path, captions, self.settings[name] | meta | {"form": form})
            wrong = ", ".join(f"{len(found)} {kind}" for kind, found in form.items() if found)
            print(f"{len(stems)} captions in {path}" + (f"; of these, wrong in form: {wrong}" if wrong else ""))
        self.file.path.unlink(missing_ok=True)
        self.unlock()
        if skipped:
            print(f"{len(skipped)} photo{'s' * (len(skipped) > 1)} skipped: {one_line(', '.join(skipped))}")
