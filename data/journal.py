"""Captioning that survives a kill: every finished photo goes to a journal, the outputs are written when all are done.

`NAME.journal.jsonl` beside the output `NAME.json` holds the run's settings in its first line, then for each photo a
line [stem, [hash of its file, null], {name of the decoding: [caption, whether it was cut]}]. It is deleted when the
outputs have been written.

Several processes divide the photos. Each has a journal, the second NAME.journal1.jsonl; a start with any number of
processes reads them all, and the first process writes the outputs when the last has done its share.
"""

import glob
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from common.config import NothingDone, UserError, changes, check
from common.files import JsonLines, check_output, lock, remove_parts
from data.photos import BadPhoto, LoadedPhoto, Photo, key_of
from data.predictions import write_predictions, wrong_in_form


class PhotoRows:
    """A row of each photo that is done, kept in the file `path` by a run that may be killed.

    The first line holds the `settings`. A row counts as long as its photo's file is the same, and what the caller says
    `about` it. `read` checks a row. Raises UserError where the file was begun with other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool, read: Callable[[Any], Any] = dict):
        self.file, self.settings = JsonLines(path), json.loads(json.dumps(settings, default=str))
        check_output(path, overwrite=True)
        if overwrite:
            path.unlink(missing_ok=True)
        begun = f"output: {path} was begun with other settings, --overwrite begins anew"
        try:
            self.before, *rows = self.file.rows() or [None]
            changed = [] if self.before is None else changes(self.before, self.settings).items()
            self.rows = {stem: (about, row if changed else read(row)) for stem, about, row in rows}
        except (UserError, ValueError, TypeError, LookupError, AttributeError):
            raise UserError(f"output: {path} is damaged; --overwrite begins anew") from None
        check([f"{begun}: {key} {change}" for key, change in changed], shown=1)

    def get(self, photo: Photo, about: object = None) -> Any:
        """The row of a photo; None where there is none that counts."""
        known, row = self.rows.get(photo.stem, (None, None))
        return row if known and known == [key_of(photo), about] else None

    def begin(self) -> None:
        """Write the line of settings, where there is none."""
        if self.before is None:
            self.before = self.settings
            self.file.append(self.settings)

    def append(self, loaded: LoadedPhoto, row: Any, about: object = None) -> None:
        """Keep the row of a photo, which has just been done."""
        self.begin()
        self.rows[loaded.stem] = [loaded.key, about], row
        self.file.append([loaded.stem, *self.rows[loaded.stem]])


class Journal:
    """The captions of one run so far, by one decoding or several, of one process or several.

    `settings` {name of the decoding: what its captions are made with} go into the meta files; `decoding` in them is a
    `models.decoding.Decoding` as a dictionary. The predictions of a single decoding go to `output`, of several to
    NAME.DECODING.json each. Raises UserError where an output exists, or where the run was begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, dict[str, Any]], overwrite: bool = False):
        self.start, stem = time.monotonic(), output.name.removesuffix(".json")
        self.settings = json.loads(json.dumps(settings, default=str))
        one = len(settings) == 1
        self.outputs = {name: output if one else output.with_name(f"{stem}.{name}.json") for name in settings}
        self.captions: dict[str, dict[str, tuple[str, bool]]] = {}
        """{stem: {name of the decoding: (caption, whether it ended at the last allowed token)}}"""
        # gloo, accelerate's choice for a CPU, is enough to wait for each other: a day, since shares take unequal times
        self.processes = PartialState(cpu="RANK" in os.environ, timeout=timedelta(days=1))
        self.journals = partial(output.parent.glob, f"{glob.escape(stem)}.journal*.jsonl")
        own = output.with_name(f"{stem}.journal{self.processes.process_index or ''}.jsonl")
        with self.processes.main_process_first():
            if self.processes.is_main_process:
                lock(output)
                remove_parts(output.parent, f".{glob.escape(stem)}.*")
                for file in self.journals() if overwrite else ():
                    file.unlink()
            begun, files = {"decoding": list(settings)} | self.settings, dict.fromkeys([own, *self.journals()])
            self.rows = [PhotoRows(file, begun, False, self._read) for file in files]
            for path in self.outputs.values():  # a run killed between its last steps leaves both journal and output
                check_output(path, overwrite or any(rows.rows for rows in self.rows))
        self.processes.wait_for_everyone()  # they divide what is missing, so all must have read the same

    def _read(self, row: dict[str, list]) -> dict[str, tuple[str, bool]]:
        return {name: ("" + row[name][0], bool(row[name][1])) for name in self.settings}

    def missing(self, photos: Sequence[Photo]) -> list[Photo]:
        """This process's share of those of `photos` that have no captions yet, or whose file has changed since."""
        for rows in self.rows:
            self.captions |= {photo.stem: row for photo in photos if (row := rows.get(photo))}
        missing = [photo for photo in photos if photo.stem not in self.captions]
        return missing[self.processes.process_index :: self.processes.num_processes]

    def append(
        self, batch: Sequence[LoadedPhoto], captions: dict[str, list[list[int]]], text: Callable[[list[int]], str]
    ) -> None:
        """Keep the captions of a batch, for each decoding a list with the token ids of a caption a photo.

        `text` turns token ids into a caption. One of as many tokens as its decoding allows was cut.
        """
        limits = {name: one["decoding"]["max_new_tokens"] for name, one in self.settings.items()}
        for i, loaded in enumerate(batch):
            ids = {name: captions[name][i] for name in limits}
            self.captions[loaded.stem] = {name: (text(ids[name]), len(ids[name]) == limits[name]) for name in limits}
            self.rows[0].append(loaded, self.captions[loaded.stem])

    def finish(self, photos: Sequence[Photo], bad: Sequence[BadPhoto], meta: dict[str, Any]) -> None:
        """Write the outputs in the order of `photos`, and delete the journals, when all processes have come here.

        The meta files get the settings, `meta`, the seconds since the journal was made, the `bad` photos with their
        reasons, and the captions that are wrong in form. Raises NothingDone where no photo could be decoded.
        """
        skipped = dict(sorted(gather_object([(error.path.name, error.reason) for error in bad])))
        for captions in gather_object([self.captions]):
            self.captions |= captions
        if not self.processes.is_main_process:
            return
        if not self.captions:
            raise NothingDone(f"none of {len(skipped)} photos could be decoded")
        meta = meta | {"seconds": round(time.monotonic() - self.start, 2), "skipped": skipped}
        stems = [photo.stem for photo in photos if photo.stem in self.captions]
        for name, path in self.outputs.items():
            captions = {stem: self.captions[stem][name][0] for stem in stems}
            form = wrong_in_form(captions, cut=frozenset(stem for stem in stems if self.captions[stem][name][1]))
            write_predictions(path, captions, self.settings[name] | meta | {"form": form})
            counts = [f"{len(found)} {kind}" for kind, found in ({"skipped": skipped} | form).items() if found]
            print(f"{len(stems)} captions in {path}" + f" ({', '.join(counts)})" * bool(counts))
        for file in self.journals():
            file.unlink()
