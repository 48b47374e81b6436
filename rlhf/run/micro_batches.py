"""A batch in micro-batches that fit memory, after each process has taken its share of the rows."""

from collections.abc import Iterator

from torch import Tensor

from rlhf.run.processes import share
from rlhf.run.progress import ticker


def chunks(rows: list, size: int) -> list[list]:
    """Micro-batches of `size` rows; the last one may be smaller. size 0: one, the whole batch.

    Shorter rows come first, so that less is padded. A row has a `size`, in tokens.
    """
    if not size:
        return [rows]
    rows = sorted(rows, key=lambda row: row.size)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def micro_batches(rows: list, size: int, what: str) -> Iterator[list]:
    """The `chunks` of this process's share of the rows, with a `ticker` that calls them `what`."""
    return ticker(chunks(share(rows), size), what)


def split_rows(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """This process's share of row indices (n,), in parts of `size`; size 0: one part."""
    mine = share(rows)
    return mine.split(size or len(mine))
