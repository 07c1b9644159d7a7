"""Columns of a log that need not fit into memory."""

import os
import tempfile
from typing import Any

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
