"""Mapped pages: those of a checkpoint's file go, and anybody else's memory stays as it is."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qpass.checkpoints import mapped_pages
from qpass.checkpoints.mapped_pages import ReadPages

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def resident(file: Path) -> int:
    """Kilobytes of the file that this process holds."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0] and ":" not in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@linux
def test_pages_of_a_mapped_file_go_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_pages, "_AT_ONCE", 6 << 20)
    file = tmp_path / "m.safetensors"
    wanted = {name: torch.randn(1024, 1024) for name in "abc"}  # 4 MB each
    save_file(wanted, str(file))
    with safe_open(str(file), "pt") as opened:
        found = {name: opened.get_tensor(name) for name in wanted}
        read = ReadPages()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        full = resident(file)
        if full < 12 << 10:
            pytest.skip("this safetensors reads into memory of its own")
        read.add(found["a"])
        assert resident(file) == full  # not yet worth it
        read.add(found["b"])
        assert resident(file) <= full - (8 << 10) + 64
        assert torch.equal(found["a"], wanted["a"]) and torch.equal(found["b"], wanted["b"])


def test_other_memory_is_left_alone() -> None:
    read = ReadPages()
    own, little = torch.ones(1 << 20), torch.ones(3)
    read.add(own)
    read.add(little)
    assert read.release() == 0 and read.release() == 0
    assert own.sum() == 1 << 20 and little.sum() == 3
