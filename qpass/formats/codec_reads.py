"""Codec reads: tensors of a checkpoint, checked on their headers, in; the read of a weight that a codec decodes, out.

Formats differ in names, in the shapes of scales that say the same ([], [1], [N], [N, 1]) and in whether a power of two
stands in uint8 or float8_e8m0fnu. All of that is settled here; the numbers are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from qpass.activation_scale import scale_names
from qpass.dtype import FLOAT8, POWERS, dtype_name
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.reader import WeightRead
from qpass.scheme import ActivationArgs, RowCodec, WeightArgs, codec_of, family_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor


def spec_of(args: WeightArgs, shape: tuple[int, ...], activation: ActivationArgs | None = None) -> LinearSpec:
    """The spec of a weight [N, K] for the reference kernel."""
    return LinearSpec(family=family_of(args, activation), weight=args, activation=activation, out_features=shape[0],
                      in_features=shape[1])


FP8_TOKEN = ActivationArgs(type="float")
FP8_STATIC = ActivationArgs(type="float", granularity="per_tensor", dynamic=False)
INT8_STATIC = ActivationArgs(granularity="per_tensor", dynamic=False)
FP4_LOCAL = ActivationArgs(bits=4, type="float", granularity="per_group", group_size=16, dynamic="local")


def static_scale(checkpoint: Checkpoint, path: str, activation: ActivationArgs | None) -> dict[str, str]:
    """The tensors of a static activation, for a read's `tensors`. Raises CheckpointError if they are not there."""
    return {name: checkpoint.need(f"{path}.{name}", of=path) for name in scale_names(activation)}


def codec_read(checkpoint: Checkpoint, path: str, args: WeightArgs, shape: tuple[int, ...],
               tensors: Mapping[str, str], activation: ActivationArgs | None = None, note: str = "") -> WeightRead:
    """A weight [N, K] of the codec `args.type`; `tensors` maps the codec's names to the checkpoint's.

    Raises CheckpointError, naming the tensor, if one is missing or cannot be what the codec stores. Reading raises
    ValueError for scales that are NaN or infinite.
    """
    codec = codec_of(args)
    assert isinstance(codec, RowCodec)
    try:
        stored = codec.stored(args, (shape[0], shape[1]))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {path}: {error}") from error
    for name, full in tensors.items():
        dtypes, size = stored[name]
        there = checkpoint.tensors[checkpoint.need(full, of=path)]
        allowed = {*dtypes, *(POWERS if "uint8" in dtypes and name == "scale" else ())}
        if there.dtype not in allowed or _count(there.shape) != _count(size):
            raise CheckpointError(f"{full} in {there.file} is {there.dtype} {list(there.shape)}; {path} [{shape[0]}, "
                                  f"{shape[1]}] as {args.type} needs {' or '.join(dtypes)} {list(size)}")

    def read(found: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
        made = {}
        for name in codec.names:
            tensor = found[name]
            if tensor.dtype == torch.float8_e8m0fnu and stored[name][0] == ("uint8",):
                tensor = tensor.view(torch.uint8)
            check_scale(tensor, tensors[name])
            made[name] = tensor.reshape(stored[name][1]).contiguous()
        codec.check(made, spec.weight, spec.shape)
        return CanonicalWeight(made)

    return WeightRead(spec=spec_of(args, shape, activation), read=read, note=note,
                      tensors={**tensors, **static_scale(checkpoint, path, activation)})


def check_scale(tensor: Tensor, name: str) -> None:
    """Raise ValueError if float numbers are NaN or infinite; codes in float8 are left alone."""
    codes = name.rpartition(".")[2] in ("weight", "_data", "qdata")
    if codes and dtype_name(tensor.dtype) in FLOAT8 and tensor.dim() >= 2:
        return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise ValueError(f"{name} holds NaN or Inf")


def fp8_args(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> WeightArgs:
    """What the shape of a float scale says of an fp8 weight [N, K]. Raises ValueError if it fits nothing.

    `block` is [rows, columns] if the config says; without it, a table of scales is taken for the smallest blocks, in
    powers of two, that give it.
    """
    n, k = weight
    sizes = tuple(size for size in scale if size != 1)
    if _count(scale) == 1:
        return WeightArgs(bits=8, type="fp8", granularity="per_tensor")
    if sizes == (n,) and (block is None or block[0] == 1):
        return WeightArgs(bits=8, type="fp8")
    table = scale if len(scale) == 2 else (scale[0], scale[2]) if len(scale) == 4 else scale
    for size in (block[1],) if block is not None else (16, 32, 64, 128, 256, 512):
        if size >= 1 and table == (n, -(-k // size)):
            return WeightArgs(bits=8, type="fp8", granularity="per_group", group_size=size)
        if size >= 1 and table == (-(-n // size), -(-k // size)):
            return WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=size)
    raise ValueError(f"a scale {list(scale)} fits no blocks {list(block) if block else ''} of a weight {[n, k]}")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
