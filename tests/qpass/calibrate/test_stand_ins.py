"""Stand-ins: they answer within the context only; what stood there before comes back, after errors too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qpass.calibrate.stand_ins import standing_in


def test_they_answer_within_and_leave_no_trace() -> None:
    plain, patched, x = nn.Identity(), nn.Identity(), torch.ones(1)
    patched.forward = lambda x: x + 1  # type: ignore[method-assign]
    # One module twice, as blocks that share their weights: the last counts, and the first thing comes back.
    with standing_in([(plain, lambda x: x + 2), (patched, lambda x: x + 3), (plain, lambda x: x + 4)]):
        assert plain(x) == 5 and patched(x) == 4
    assert plain(x) == 1 and patched(x) == 2 and "forward" not in plain.__dict__
    with pytest.raises(ValueError, match="within"), standing_in([(plain, lambda x: x + 2)]):
        raise ValueError("within")
    assert plain(x) == 1
