"""Memory for packed weights: aligned to large pages, no larger than the tensor, and ordinary where there are none."""

import copy
import math
import mmap

import pytest
import torch

from qpass import large_pages
from qpass.large_pages import PAGE, empty, zeros

needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages on request here")


@needs_advice
@pytest.mark.parametrize("nbytes", [PAGE, PAGE + 4, 3 * PAGE - 4])
def test_starts_at_a_large_page_and_holds_what_is_written(nbytes: int) -> None:
    made = empty((nbytes // 4, 2), torch.bfloat16)
    assert made.shape == (nbytes // 4, 2) and made.dtype == torch.bfloat16 and made.is_contiguous()
    assert made.data_ptr() % PAGE == 0
    assert made.untyped_storage().nbytes() == nbytes  # a copy or a file of it takes no more
    made.copy_(torch.arange(made.numel()).view_as(made) % 251)
    twin = copy.deepcopy(made)
    again = empty((nbytes // 4, 2), torch.bfloat16).fill_(-1)  # memory of its own
    assert torch.equal(made, twin) and not torch.equal(made, again)


@needs_advice
def test_asks_for_whole_pages_inside_the_tensor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Memory(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:  # type: ignore[override]
            asked.append((start, length))

    monkeypatch.setattr(large_pages.mmap, "mmap", Memory)
    made = empty((2 * PAGE + 5,), torch.uint8)
    (start, length), = asked
    assert length == 2 * PAGE
    assert start < PAGE and made.data_ptr() % PAGE == 0


def test_small_tensors_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages.mmap, "mmap", None)  # not called
    assert empty((PAGE - 1,), torch.uint8).shape == (PAGE - 1,)
    assert empty((0, 7), torch.float32).shape == (0, 7)


@needs_advice
def test_ordinary_memory_where_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr(large_pages.mmap, "mmap", refuse)
    assert empty((PAGE, 2), torch.int8).fill_(3).sum() == 6 * PAGE
    assert not zeros((PAGE, 2), torch.int8).any()


@pytest.mark.parametrize("shape", [(PAGE + 3,), (2, PAGE), (7, 5)])
def test_zeros(shape: tuple[int, ...]) -> None:
    empty(shape, torch.int8).fill_(1)  # memory that comes back does not show
    made = zeros(shape, torch.int8)
    assert made.shape == shape and made.is_contiguous() and not made.any()
    assert math.prod(shape) < PAGE or made.data_ptr() % PAGE == 0 or not hasattr(mmap, "MADV_HUGEPAGE")


def test_systems_without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_ADVICE", None)
    assert empty((PAGE,), torch.uint8).numel() == PAGE
