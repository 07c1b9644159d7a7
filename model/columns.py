"""Columns of a log that need not fit into memory."""

import os
import tempfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

READ_EVENTS = 2**20  # read or copied at once
FILE_EVENTS = 2**24  # columns of more numbers than this are kept in files


def new_column(length: int, dtype: Any) -> NDArray[Any]:
    """An array to be filled; a large one of numbers lives in a file.

    The file is in the folder for temporary ones (`TMPDIR`) and has no name: it is gone with the
    array. What was not read lately need not be in memory. Strings (dtype object) always are.
    """
    dtype = np.dtype(dtype)
    if dtype.hasobject or length < FILE_EVENTS:
        return np.empty(length, dtype=dtype)
    with tempfile.TemporaryFile(prefix="hrnn-column-") as file:
        # A full disk is to be known now, not by a signal when a page is written.
        os.posix_fallocate(file.fileno(), 0, length * dtype.itemsize)
        return np.memmap(file, dtype=dtype, mode="r+", shape=(length,))


class GrowingColumn:
    """A column whose length is not known before it is there, piece after piece.

    Long ones are in a file like those of `new_column`.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._held: list[NDArray[Any]] = []  # not yet in the file
        self._file: IO[bytes] | None = None
        self._length = 0

    def extend(self, values: NDArray[Any]) -> None:
        """Add to the end."""
        for start in range(0, len(values), READ_EVENTS):
            piece = np.ascontiguousarray(values[start : start + READ_EVENTS], dtype=self._dtype)
            self._held.append(piece)
            self._length += len(piece)
            if self._length < FILE_EVENTS:
                continue
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="hrnn-column-")  # noqa: SIM115 - `finish`
            for held in self._held:
                self._file.write(held.data)
            self._held = []

    def finish(self) -> NDArray[Any]:
        """The whole column; nothing may be added after it."""
        if self._file is None:
            return np.concatenate([np.empty(0, self._dtype), *self._held])
        with self._file as file:
            file.flush()
            return np.memmap(file, dtype=self._dtype, mode="r+", shape=(self._length,))
