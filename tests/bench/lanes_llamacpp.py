"""Lanes of llama.cpp: ggml's mul_mat through ctypes, each weight in the buffer where its loader puts it.

`GGML_LIB_DIR` is the folder of libggml-base.so and libggml-cpu.so. Input and output are float32, the rounding of the
input is in the time.
"""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lane import FEW, ROUNDED_INPUT, SMALL, Call, Floats, Lane, copies_for
from worker import serve

VP, I32, I64, SZ = C.c_void_p, C.c_int, C.c_int64, C.c_size_t
TYPES = {"Q4_0": 2, "Q8_0": 8}
BLOCK = 32
_BUFFER_OFFSET = 8  # of ggml_tensor.buffer, after an enum of 4 bytes


class _Init(C.Structure):
    _fields_ = (("mem_size", SZ), ("mem_buffer", VP), ("no_alloc", C.c_bool))


class Ggml:
    """The functions in use, with their types, and where weights go: the first extra buffer type that repacks them."""

    def __init__(self, folder: Path) -> None:
        self.base = C.CDLL(str(folder / "libggml-base.so"), mode=C.RTLD_GLOBAL)
        cpu = C.CDLL(str(folder / "libggml-cpu.so"), mode=C.RTLD_GLOBAL)
        self.init = _typed(self.base, "ggml_init", VP, _Init)
        self.new_2d = _typed(self.base, "ggml_new_tensor_2d", VP, VP, I32, I64, I64)
        self.mul_mat = _typed(self.base, "ggml_mul_mat", VP, VP, VP, VP)
        self.new_graph = _typed(self.base, "ggml_new_graph", VP, VP)
        self.expand = _typed(self.base, "ggml_build_forward_expand", None, VP, VP)
        self.quantize = _typed(self.base, "ggml_quantize_chunk", SZ, I32, VP, VP, I64, I64, I64, VP)
        self.row_size = _typed(self.base, "ggml_row_size", SZ, I32, I64)
        self.alloc = _typed(self.base, "ggml_backend_alloc_ctx_tensors_from_buft", VP, VP, VP)
        self.free_buffer = _typed(self.base, "ggml_backend_buffer_free", None, VP)
        self.free = _typed(self.base, "ggml_free", None, VP)
        self.put = _typed(self.base, "ggml_backend_tensor_set", None, VP, VP, SZ, SZ)
        self.get = _typed(self.base, "ggml_backend_tensor_get", None, VP, VP, SZ, SZ)
        self.compute = _typed(self.base, "ggml_backend_graph_compute", I32, VP, VP)
        self.plain = _typed(self.base, "ggml_backend_cpu_buffer_type", VP)()
        self.backend = _typed(cpu, "ggml_backend_cpu_init", VP)()
        _typed(cpu, "ggml_backend_cpu_set_n_threads", None, VP, I32)(
            self.backend, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        registry = _typed(cpu, "ggml_backend_cpu_reg", VP)()
        self.device = _typed(self.base, "ggml_backend_reg_dev_get", VP, VP, SZ)(registry, 0)
        self.supports = _typed(self.base, "ggml_backend_dev_supports_op", C.c_bool, VP, VP)
        self.alloc_buffer = _typed(self.base, "ggml_backend_buft_alloc_buffer", VP, VP, SZ)
        address = _typed(self.base, "ggml_backend_reg_get_proc_address", VP, VP, C.c_char_p)
        name_of = _typed(self.base, "ggml_backend_buft_name", C.c_char_p, VP)
        found = C.CFUNCTYPE(C.POINTER(VP), VP)(address(registry, b"ggml_backend_dev_get_extra_bufts"))(self.device)
        self.extra: dict[str, Any] = {}
        index = 0
        while found[index]:
            self.extra[name_of(found[index]).decode()] = found[index]
            index += 1

    def placed(self, kind: int, n: int, k: int) -> Any:
        """Where the loader of models puts such a weight: the first buffer type that can multiply it, AMX before the
        interleaved layouts for vectors, or the plain one."""
        context = self.init(_Init(1 << 16, None, True))
        weight, x = self.new_2d(context, kind, k, n), self.new_2d(context, 0, k, 16)
        product = self.mul_mat(context, weight, x)
        for buffer_type in self.extra.values():
            buffer = self.alloc_buffer(buffer_type, 0)
            C.c_void_p.from_address(weight + _BUFFER_OFFSET).value = buffer
            can = self.supports(self.device, product)
            self.free_buffer(buffer)
            if can:
                self.free(context)
                return buffer_type
        self.free(context)
        return self.plain


def _typed(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


def lane(ggml: Ggml, name: str, weights: Sequence[Floats], rotate: int) -> Lane:
    """Copies of one weight as this ggml type, and a graph of one product for each."""
    (weight,), kind = weights, TYPES[name]
    n, k = weight.shape
    nbytes = ggml.row_size(kind, k) * n
    blocks = np.empty(nbytes, np.uint8)
    source = np.ascontiguousarray(weight)
    ggml.quantize(kind, source.ctypes.data, blocks.ctypes.data, 0, n, k, None)
    copies = copies_for(nbytes, rotate)
    context = ggml.init(_Init(copies * 512 + (1 << 16), None, True))
    tensors = [ggml.new_2d(context, kind, k, n) for _ in range(copies)]
    owners = [_Buffer(ggml, context, ggml.alloc(context, ggml.placed(kind, n, k)))]
    for tensor in tensors:
        ggml.put(tensor, blocks.ctypes.data, 0, nbytes)

    def calls(m: int) -> list[Call]:
        used = tensors if m <= SMALL else tensors[:FEW]
        graphs = ggml.init(_Init(len(used) * 130000 + (1 << 20), None, True))
        x, made = ggml.new_2d(graphs, 0, k, m), []
        for tensor in used:
            y, graph = ggml.mul_mat(graphs, tensor, x), ggml.new_graph(graphs)
            ggml.expand(graph, y)
            made.append((graph, y))
        owners.append(_Buffer(ggml, graphs, ggml.alloc(graphs, ggml.plain)))
        state = {"held": None}

        def call(given: Floats, graph: Any, y: Any) -> Any:
            if state["held"] is not given:
                ggml.put(x, given.ctypes.data, 0, given.nbytes)
                state["held"] = given
            ggml.compute(ggml.backend, graph)
            return y

        return [partial(call, graph=graph, y=y) for graph, y in made]

    def give(y: Any, rows: Sequence[int]) -> list[Floats]:
        out = np.empty((len(rows), n), np.float32)
        for i, row in enumerate(rows):
            ggml.get(y, out[i].ctypes.data, row * n * 4, n * 4)
        # The next call must write it anew to pass the check.
        zeros = np.zeros(n, np.float32)
        for row in rows:
            ggml.put(y, zeros.ctypes.data, row * n * 4, n * 4)
        return [out]

    return Lane(calls=calls, take=np.ascontiguousarray, give=give, weight=_multiplied_out(blocks, name, n, k),
                nbytes=nbytes, tolerance=ROUNDED_INPUT)


class _Buffer:
    """Frees a ggml buffer and its context with the lane that owns it."""

    def __init__(self, ggml: Ggml, context: Any, buffer: Any) -> None:
        self.ggml, self.context, self.buffer = ggml, context, buffer

    def __del__(self) -> None:
        self.ggml.free_buffer(self.buffer)
        self.ggml.free(self.context)


def _multiplied_out(blocks: Any, name: str, n: int, k: int) -> Floats:
    """ggml's blocks of 32: a float16 scale, then codes; Q4_0 keeps inputs 0-15 in low nibbles and 16-31 in high."""
    rows = blocks.reshape(n * k // BLOCK, -1)
    scale = rows[:, :2].copy().view(np.float16).astype(np.float32)
    if name == "Q4_0":
        codes = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], 1).astype(np.float32) - 8
    else:
        codes = rows[:, 2:].view(np.int8).astype(np.float32)
    return np.asarray((codes * scale).reshape(n, k), dtype=np.float32)


def main() -> None:
    folder = Path(os.environ["GGML_LIB_DIR"])
    ggml = Ggml(folder)
    version = (folder / "libggml-cpu.so").resolve().name.partition(".so.")[2] or "unknown"
    found = {"llama.cpp's ggml": version, "weights in": next(iter(ggml.extra), "plain")}
    serve({name: partial(lane, ggml, name) for name in TYPES}, lambda: found)


if __name__ == "__main__":
    main()
