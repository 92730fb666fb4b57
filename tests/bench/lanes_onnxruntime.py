"""Lanes of onnxruntime: a graph of independent MatMulNBits, one for each copy of the weight, asked for as a whole.

accuracy_level 4, which rounds the input to int8; blocks of 32 inputs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from lane import FEW, ROUNDED_INPUT, SMALL, Call, Floats, Lane, copies_for, multiplied_out, round_to_nearest
from onnx import TensorProto, helper
from worker import serve

BITS = {"w4_g32": 4, "w8_g32": 8}
BLOCK = 32


def lane(name: str, weights: Sequence[Floats], rotate: int) -> Lane:
    """Sessions of FEW copies and of as many as fill `rotate`, each made when first needed."""
    bits = BITS[name]
    n, k = weights[0].shape
    codes, scale = round_to_nearest(weights[0], bits, BLOCK)
    nbytes = n * k * bits / 8 + scale.size * 4

    def count(m: int) -> int:
        # An ONNX file is a protobuf message, which may have 2 GB.
        return min(copies_for(nbytes, rotate), int(1.5e9 / nbytes)) if m <= SMALL else FEW

    made: dict[int, Any] = {}

    def calls(m: int) -> list[Call]:
        copies = count(m)
        if copies not in made:
            made[copies] = _session(codes, scale, bits, copies)
        session = made[copies]
        outputs = [onnxruntime.OrtValue.ortvalue_from_shape_and_type((m, n), np.float32) for _ in range(copies)]
        bound = session.io_binding()
        for i, value in enumerate(outputs):
            bound.bind_ortvalue_output(f"y{i}", value)

        def call(x: Any) -> Any:
            bound.bind_ortvalue_input("x", x)
            session.run_with_iobinding(bound)
            return outputs

        return [call]

    return Lane(calls=calls, take=lambda x: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)),
                give=lambda y, rows: [value.numpy()[rows] for value in y], weight=multiplied_out(codes, scale),
                nbytes=nbytes, tolerance=ROUNDED_INPUT, together=count)


def _session(codes: Any, scale: Floats, bits: int, copies: int) -> Any:
    n, k = codes.shape
    unsigned = (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    if bits == 4:
        pairs = unsigned.reshape(-1, 2)
        unsigned = pairs[:, 0] | pairs[:, 1] << 4
    shape = (n, k // BLOCK, BLOCK * bits // 8)
    nodes, held = [], []
    for i in range(copies):
        held += [helper.make_tensor(f"w{i}", TensorProto.UINT8, shape, unsigned.tobytes(), raw=True),
                 helper.make_tensor(f"s{i}", TensorProto.FLOAT, (n * k // BLOCK,), scale.tobytes(), raw=True)]
        nodes.append(helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", K=k,
                                      N=n, bits=bits, block_size=BLOCK, accuracy_level=4))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])
    ys = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", n]) for i in range(copies)]
    model = helper.make_model(helper.make_graph(nodes, "products", [x], ys, held), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    serve({name: partial(lane, name) for name in BITS}, lambda: {"onnxruntime": onnxruntime.__version__})
