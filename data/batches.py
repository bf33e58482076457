"""Which captions go together: rows of one photo's captions, batches of rows, an epoch's order."""

import random
from collections.abc import Sequence

Caption = list[int]  # token ids
Row = tuple[int, list[Caption]]  # (index of the photo, captions that share its prefix)


def epoch_batches(
    captions: list[list[Caption]], batch_size: int, captions_per_row: int, seed: int | None = None, bucket: bool = False
) -> list[list[Row]]:
    """Cut one epoch, every (photo, caption) pair once, into batches of `batch_size` captions.

    `captions` holds each photo's tokenised captions; `batch_size` is a multiple of `captions_per_row`. With a `seed`
    the photo's captions, the rows and the batches are shuffled; without one they keep their order. `bucket` puts rows
    of like length together (within 32 batches), which saves padding. The number of batches depends on nothing but the
    counts, so that schedules can rely on it.
    """
    shuffle = random.Random(seed).shuffle if seed is not None else lambda items: None
    rows: list[Row] = []
    for photo, of_photo in enumerate(map(list, captions)):
        shuffle(of_photo)
        rows += [(photo, of_photo[i : i + captions_per_row]) for i in range(0, len(of_photo), captions_per_row)]
    shuffle(rows)
    size = batch_size // captions_per_row
    if bucket:
        near = 32 * size
        rows = [row for i in range(0, len(rows), near) for row in sorted(rows[i : i + near], key=row_tokens)]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    if bucket:
        shuffle(batches)
    return batches


def row_tokens(row: Row) -> int:
    """Supervised tokens of a row: each caption and its EOS."""
    return sum(len(caption) + 1 for caption in row[1])


def batch_tokens(batch: Sequence[Row]) -> int:
    """Supervised tokens of a batch."""
    return sum(map(row_tokens, batch))


def parts_of_process(batch: Sequence[Row], accumulation: int, processes: int, process: int) -> list[list[Row]]:
    """The parts of a batch that one process takes, one after another: `accumulation` of about equal size.

    Where the rows are too few there are fewer parts, but each process gets at least one, which may be empty.

    >>> rows = [(photo, [[7, 8]]) for photo in range(5)]
    >>> [[photo for photo, _ in part] for part in parts_of_process(rows, 2, 2, process=1)]
    [[1], [3]]
    """
    count = accumulation * processes
    parts = [list(batch[start::count]) for start in range(process, count, processes)]
    return [part for part in parts if part] or [[]]
