"""Columns of few rows in the places of many: as rows finish, those that go on may have more columns in the same memory.

A cache has blocks of columns, each with a place for every row. When at most a half of the rows is in hand, in the first
places, the other half is as good for as many blocks again; and with at most a quarter, so are the other quarters.
"""

from __future__ import annotations

from jaxtyping import Array, Int

FOLDS = 4  # quarters of the places
COLUMNS = 128  # a kernel's block of columns does not go over the end of the blocks


def folded(block: Int[Array, ""] | int, blocks: int, places: int) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """Which of the blocks that there are holds this one, and the first of its places there: those of the second turn
    through the blocks begin at the half, of the third at the first quarter, of the fourth at the last."""
    turn = block // blocks
    return block % blocks, (turn % 2 * 2 + turn // 2) * (places // FOLDS)


def folds_of(rows: int, places: int) -> int:
    """How many times through the blocks so many rows may go."""
    quarter = places // FOLDS
    return FOLDS if rows <= quarter else 2 if rows <= 2 * quarter else 1


def columns_at_first(columns: int, folds: int) -> int:
    """For how many there has to be room, so that rows may come to so many."""
    return columns if folds == 1 else -(-columns // (folds * COLUMNS)) * COLUMNS
