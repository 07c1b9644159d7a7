"""Tables in huge pages: values and addresses stay, and the pages are huge where there are any."""

import sys
from pathlib import Path

import pytest
import torch

from model.pages import HUGE_PAGE, in_huge_pages


def _huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])


def _collapses() -> bool:
    """Whether this kernel gives huge pages to memory that is in use already."""
    release = Path("/proc/sys/kernel/osrelease").read_text().split(".")
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return (int(release[0]), int(release[1])) >= (6, 1) and setting.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_values_stay_and_the_pages_are_huge():
    table = torch.rand(16 * HUGE_PAGE // 4 // 32, 32)
    values, address, before = table.clone(), table.data_ptr(), _huge_bytes()
    in_huge_pages([table])
    assert torch.equal(table, values) and table.data_ptr() == address
    table.add_(1.0)
    assert torch.equal(table, values + 1.0)
    if _collapses():
        assert _huge_bytes() - before >= 8 * HUGE_PAGE


def test_what_fills_no_huge_page_is_left_alone():
    for table in (torch.empty(0), torch.rand(3), torch.rand(HUGE_PAGE, 2)[:, 0]):
        values = table.clone()
        in_huge_pages([table])
        assert torch.equal(table, values)
