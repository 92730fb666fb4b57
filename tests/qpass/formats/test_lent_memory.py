"""Lent memory: the same bytes again once they are free, and never while somebody holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from qpass.formats.lent_memory import LentMemory
from qpass.formats.safetensors_folder import SafetensorsFolder


def test_memory_is_lent_again_once_nobody_holds_it() -> None:
    lent = LentMemory()
    tensor = lent.tensor((64, 64), torch.float32)
    tensor.fill_(1)
    address = tensor.data_ptr()
    del tensor
    smaller = lent.tensor((3, 5), torch.bfloat16)
    assert smaller.data_ptr() == address and smaller.shape == (3, 5) and smaller.dtype is torch.bfloat16


def test_a_tensor_a_view_and_a_parameter_keep_it() -> None:
    lent, held = LentMemory(), []
    for i, keep in enumerate((lambda t: t, lambda t: t[1:].t(), lambda t: torch.nn.Parameter(t.detach()),
                              lambda t: t.view(torch.int32), lambda t: t.numpy(), lambda t: t.untyped_storage())):
        held.append(keep(lent.tensor((8, 8), torch.float32).fill_(i)))
    values = [torch.as_tensor(list(t), dtype=torch.uint8).view(torch.float32) if isinstance(t, torch.UntypedStorage)
              else torch.as_tensor(t).contiguous().view(torch.float32) for t in held]
    assert all(bool((value == i).all()) for i, value in enumerate(values))


def test_no_numbers_no_memory() -> None:
    assert LentMemory().tensor((0, 4), torch.float16).shape == (0, 4)


def test_folder_reads_into_it(tmp_path: Path) -> None:
    wanted = {name: torch.randn(7, 9).bfloat16() for name in "abc"}
    save_file(wanted, tmp_path / "model.safetensors")
    folder, lent = SafetensorsFolder(tmp_path), LentMemory()
    first = folder.read(["a"], lent=lent)["a"]
    second = folder.read(["b"], lent=lent)["b"]
    assert torch.equal(first, wanted["a"]) and torch.equal(second, wanted["b"])
    address = second.data_ptr()
    del second
    third = folder.read(["c"], lent=lent)["c"]
    assert third.data_ptr() == address and torch.equal(third, wanted["c"]) and torch.equal(first, wanted["a"])
    assert torch.equal(folder.read(["b"], at=2, lent=lent)["b"], wanted["b"][2])
