"""Float layer: the tensors of one layer of a checkpoint in 8, 6 or 4-bit floats, told by dtypes and shapes, to a read.

    weight float8, a float scale                        fp8, by tensor, row, group or block
    weight float8 [N, K], uint8 scales [N, K / 32]      mxfp8
    weight uint8 [N, K / 2], uint8 scales [N, K / 32]   mxfp4
    weight uint8 [N, 6 K / 8], uint8 scales             mxfp6, in the element that the config says
    weight uint8 [N, K / 2], float8 scales [N, K / 16]  nvfp4, with a global scale that divides or multiplies
"""

from __future__ import annotations

from qpass.dtype import FLOAT8, POWERS
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.codec_reads import codec_read, fp8_args
from qpass.formats.reader import WeightRead
from qpass.scheme import ActivationArgs, WeightArgs


def float_layer(checkpoint: Checkpoint, path: str, shape: tuple[int, ...], *, weight: str = "weight",
                scale: str = "weight_scale", divisor: str | None = None, factor: str | None = None,
                reciprocal: bool = False, block: tuple[int, int] | None = None, element: str = "mxfp6_e3m2",
                activation: ActivationArgs | None = None) -> WeightRead | None:
    """The read of `path`, a weight [N, K]; None if `weight` is there in none of these forms.

    weight, scale    names of the tensors, without the path
    divisor, factor  name of nvfp4's global scale, by which the others are divided or multiplied; at most one is given
    reciprocal       whether the divisor is taken as 1 / divisor, to multiply with

    Raises CheckpointError, naming the layer, if tensors are missing or do not fit each other.
    """
    codes = checkpoint.tensors.get(f"{path}.{weight}")
    if codes is None or codes.dtype not in (*FLOAT8, "uint8") or len(shape) != 2:
        return None
    n, k = shape
    names = {"weight": f"{path}.{weight}", "scale": f"{path}.{scale}"}
    scales = checkpoint.tensors[checkpoint.need(names["scale"], of=path)]
    if codes.dtype in FLOAT8:
        if codes.shape != (n, k):
            raise CheckpointError(f"{names['weight']} in {codes.file} is {list(codes.shape)}, the layer is {[n, k]}")
        if scales.dtype == "uint8" and scales.shape == (n, -(-k // 32)):
            return codec_read(checkpoint, path, _group(8, "mxfp8", 32), shape, names, activation)
        try:
            args = fp8_args((n, k), scales.shape, block)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {path}: {error}") from error
        return codec_read(checkpoint, path, args, shape, names, activation)
    names["packed"] = names.pop("weight")
    if scales.dtype in POWERS:
        bits = 8 * codes.shape[-1] // max(k, 1)
        kind = {4: "mxfp4", 6: element}.get(bits)
        if kind is None:
            raise CheckpointError(f"{names['packed']} in {codes.file} has {bits} bits a weight for {k} inputs; 4 and 6 "
                                  "are read with powers of two")
        return codec_read(checkpoint, path, _group(bits, kind, 32), shape, names, activation)
    if divisor is not None:
        names["global_scale"] = f"{path}.{divisor}"
        kind = "nvfp4_reciprocal" if reciprocal else "nvfp4"
        return codec_read(checkpoint, path, _group(4, kind, 16), shape, names, activation)
    if factor is None:
        return None
    names["scale_2"] = f"{path}.{factor}"
    return codec_read(checkpoint, path, _group(4, "nvfp4_mul", 16), shape, names, activation)


def layer_shape(checkpoint: Checkpoint, path: str, names: tuple[str, ...] = ("weight", "weight_packed")
                ) -> tuple[int, int] | None:
    """(N, K) of a layer in one of these forms, from headers alone."""
    for name in names:
        codes, scale = checkpoint.tensors.get(f"{path}.{name}"), checkpoint.tensors.get(f"{path}.weight_scale")
        if codes is None or len(codes.shape) != 2:
            continue
        if codes.dtype != "uint8":
            return codes.shape[0], codes.shape[1]
        if scale is not None and len(scale.shape) == 2:
            return codes.shape[0], scale.shape[1] * (32 if scale.dtype in POWERS else 16)
    return None


def _group(bits: int, kind: str, size: int) -> WeightArgs:
    return WeightArgs(bits=bits, type=kind, granularity="per_group", group_size=size)
