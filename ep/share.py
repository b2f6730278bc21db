"""Which rows of a batch are one router's, where several compute the same batch (tensor-parallel attention). Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Part `rank` of `size` parts of every batch: equal parts in the order of the rows, the last ones short or empty.

    All parts padded to `length` and put together begin with the batch, so that one all-gather restores it.
    """

    rank: int = 0
    size: int = 1

    def length(self, num_rows: int) -> int:
        """Rows of the longest part of a batch of num_rows. Also of symbolic sizes, while a graph is traced."""
        return (num_rows + self.size - 1) // self.size

    def rows(self, num_rows: int) -> slice:
        """This part's rows of a batch of num_rows."""
        length = self.length(num_rows)
        return slice(min(self.rank * length, num_rows), min((self.rank + 1) * length, num_rows))


WHOLE = Share()
ALL_ROWS = slice(None)
