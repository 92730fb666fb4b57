"""Prefix: a model and the outputs of its first blocks in, the arguments that the next block is called with out.

The model's own forward runs, with every block before the next one answering what it gave last time and the next one
ending the run: so whatever a model does between its blocks (masks, positions, norms, a second stack of layers) is done
by the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qpass.calibrate.blocks import Block
from qpass.calibrate.samples import Sample
from qpass.calibrate.stand_ins import standing_in
from qpass.errors import CalibrationError

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


def call_of(model: nn.Module, blocks: Sequence[Block], number: int, sample: Sample,
            outputs: Mapping[int, Any]) -> Call:
    """The arguments of block `number` on `sample`; `outputs` are those of earlier blocks that are still read.

    Floating tensors come in float32. Raises CalibrationError if the forward never gets to the block, or if the block's
    input holds NaN or Inf.
    """
    path = blocks[number].path
    if not path:
        call: Call = (sample.args, dict(sample.kwargs))
    else:
        with _answering(model, blocks, number, outputs):
            try:
                model(*sample.args, **sample.kwargs)
            except _Reached as reached:
                call = reached.call
            else:
                raise CalibrationError(f"a calibration sample never reached {path}; give samples that use every layer, "
                                       "or add its layers to ignore")
    found: Call = tree_map(_in_float32, call)
    return found


def check_finite(call: Call, where: str, sample: int) -> None:
    """Raise CalibrationError if the block's first tensor holds NaN or Inf."""
    x = next((value for value in (*call[0], *call[1].values())
              if isinstance(value, Tensor) and value.is_floating_point()), None)
    if x is not None and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise CalibrationError(f"calibration sample {sample} gives NaN or Inf at the input of {where or 'the model'}; "
                               "leave that sample out, or look for a weight that overflows in this dtype")


def _answering(model: nn.Module, blocks: Sequence[Block], number: int, outputs: Mapping[int, Any]
               ) -> AbstractContextManager[None]:
    """Within, blocks before `number` answer their output, and that one raises _Reached."""
    # What nothing reads any more only has to have the right shape.
    return standing_in((model.get_submodule(block.path), _stop if index == number else
                        _answer(outputs.get(index, outputs.get(number - 1))))
                       for index, block in enumerate(blocks[:number + 1]))


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _Reached((args, kwargs))


def _answer(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
        return value.float()
    return value
