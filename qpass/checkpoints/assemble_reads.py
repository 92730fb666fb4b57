"""Assemble reads: the weights that one parameter is made of in; one way to read the parameter out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qpass.checkpoints.checkpoint_names import Assembly
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.hadamard import multiply_blocks
from qpass.weight import CanonicalWeight, dequantize_weight

Found = WeightRead | FloatRead | None


def assemble(assembly: Assembly, shape: tuple[int, ...], checkpoint: Checkpoint, reader: Reader | None, where: str, *,
             linear: bool = False) -> Found:
    """How to read a parameter of `shape` from several weights of a checkpoint, or from one of another name.

    One quantized weight stays quantized, and so do several that stand below each other and share a scheme. Anything
    else is decoded to float, which the read's note says. Raises CheckpointError, naming `where`, if the weights cannot
    make up the shape.
    """
    if assembly.refusal:
        raise CheckpointError(f"{checkpoint.path}: {where}: {assembly.refusal}")
    pieces = [(name, _piece_shape(name, assembly, shape, checkpoint, reader)) for name in assembly.names]
    reads = [_ask(name, piece, reader, linear=linear or assembly.stacked) for name, piece in pieces]
    if len(pieces) == 1 and not assembly.stacked:
        return reads[0] or _plain(*pieces[0], checkpoint, where)
    if not assembly.stacked and linear and (joined := _joined(reads, shape)) is not None:
        return joined
    quantized = next((read for read in reads if isinstance(read, WeightRead)), None)
    note = ""
    if quantized is not None:
        note = f"decoded to float: no packed layer holds experts of {quantized.spec.family}"
    floats = [decoded(read, piece, "") if isinstance(read, WeightRead)
              else read or _plain(name, piece, checkpoint, where)
              for read, (name, piece) in zip(reads, pieces, strict=True)]
    return _stacked(floats, assembly, note)


def decoded(read: WeightRead, shape: tuple[int, ...], why: str, *, transposed: bool = False) -> FloatRead:
    """The same weight as a float tensor of `shape`, which is [N, K], or [K, N] if transposed."""

    def decode(tensors: dict[str, Tensor]) -> Tensor:
        weight = float_weight(read.read(tensors, read.spec), read)
        return (weight.t() if transposed else weight).reshape(shape)

    return FloatRead(tensors=read.tensors, read=decode, note=f"decoded to float: {why}" if why else "")


def float_weight(weight: CanonicalWeight, read: WeightRead) -> Tensor:
    """float32 [N, K] that multiplies the input as it is: columns in the input's order, its scale multiplied in."""
    order, scale = weight.tensors.pop("input_order", None), weight.tensors.pop("pre_scale", None)
    mixed = weight.tensors.pop("hadamard", None)
    full = dequantize_weight(weight, read.spec)
    if order is not None:
        full = full[:, order.long().argsort()]
    full = full if scale is None else full * scale.float()
    return full if mixed is None else multiply_blocks(full, int(mixed))


def _ask(name: str, shape: tuple[int, ...], reader: Reader | None, *, linear: bool) -> Found:
    if reader is None:
        return None
    return reader.weight(Place(path=name.removesuffix(".weight"), name=name, shape=shape, linear=linear))


def _piece_shape(name: str, assembly: Assembly, shape: tuple[int, ...], checkpoint: Checkpoint, reader: Reader | None
                 ) -> tuple[int, ...]:
    if assembly.stacked:
        experts, rows, *rest = shape
        if len(shape) != 3 or len(assembly.parts[0]) != experts or rows % len(assembly.parts):
            raise CheckpointError(f"{checkpoint.path}: {len(assembly.parts[0])} weights such as {name} cannot make up "
                                  f"a parameter {list(shape)}")
        return rows // len(assembly.parts), *rest
    if len(assembly.parts) == 1:
        return shape
    if name in checkpoint.tensors:
        return checkpoint.tensors[name].shape
    found = None if reader is None else reader.shape_of(name.removesuffix(".weight"))
    return found or (shape[0] // len(assembly.parts), *shape[1:])


def _plain(name: str, shape: tuple[int, ...], checkpoint: Checkpoint, where: str) -> FloatRead:
    checkpoint.need(name, of=where, shape=shape)
    return FloatRead(tensors={name: name}, read=lambda tensors: tensors[name])


def _joined(reads: list[Found], shape: tuple[int, ...]) -> WeightRead | None:
    """Quantized weights below each other as one, if they share a scheme and have nothing of their own besides."""
    first = reads[0]
    if not isinstance(first, WeightRead) or first.spec.weight.granularity == "per_tensor":
        return None
    same = [read for read in reads if isinstance(read, WeightRead) and not read.note
            and (read.spec.weight, read.spec.activation) == (first.spec.weight, first.spec.activation)]
    if len(same) != len(reads) or sum(read.spec.out_features for read in same) != shape[0]:
        return None
    if first.spec.weight.type != "int":
        return None

    def read_all(tensors: dict[str, Tensor], spec: object) -> CanonicalWeight:
        parts = [one.read({short: tensors[f"{i}.{short}"] for short in one.tensors}, one.spec).tensors
                 for i, one in enumerate(same)]
        if any({"input_order", "pre_scale", "hadamard"} & set(part) for part in parts):
            raise ValueError("weights that permute, scale or mix their input cannot be joined")
        return CanonicalWeight({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    return WeightRead(spec=replace(first.spec, out_features=shape[0]), read=read_all,
                      tensors={f"{i}.{short}": full for i, one in enumerate(same)
                               for short, full in one.tensors.items()})


def _stacked(reads: list[FloatRead], assembly: Assembly, note: str) -> FloatRead:
    per_part = len(assembly.parts[0])

    def read_all(tensors: dict[str, Tensor]) -> Tensor:
        pieces = [one.read({short: tensors[f"{i}.{short}"] for short in one.tensors}) for i, one in enumerate(reads)]
        parts = [torch.stack(pieces[p:p + per_part]) if assembly.stacked else pieces[p]
                 for p in range(0, len(pieces), per_part)]
        return torch.cat(parts, dim=1 if assembly.stacked else 0)

    return FloatRead(read=read_all, note=note, tensors={
        f"{i}.{short}": full for i, one in enumerate(reads) for short, full in one.tensors.items()})
