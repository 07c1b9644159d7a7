"""Large tables in huge pages.

A step reads and writes some thousand rows anywhere in tables of hundreds of megabytes: in pages of
4 KiB nearly every row needs a translation of its address that the processor has not kept.
"""

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

HUGE_PAGE = 2 * 2**20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # Linux' mman.h


def in_huge_pages(tables: Iterable[Tensor]) -> None:
    """Ask the kernel to put these tables into huge pages now, as far as they fill such pages.

    Values stay, and so do addresses. It is advice: on a GPU, on other systems, on a kernel before
    6.1 or one without huge pages to give, the tables are left as they are.
    """
    if sys.platform != "linux":
        return
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    for table in tables:
        if table.device.type != "cpu" or not table.is_contiguous():
            continue
        start = -(-table.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = (table.data_ptr() + table.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        if size > 0:
            for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
