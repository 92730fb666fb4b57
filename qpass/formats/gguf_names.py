"""GGUF names: a parameter's name in, the tensors of the file that it is made of and how their rows are arranged, out.

Both come from others' tables, so that no architecture is spelled out here: llama.cpp's names from gguf-py's
tensor_mapping, and what llama.cpp's converter did to the numbers (rows of q and k interleaved for its rotary
embedding, ones added to norms) from the processors of Transformers' own GGUF loader, which undo it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qpass.errors import CheckpointError, QPassError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = re.compile(r"\.(\d+)\.")
# The parameter of fused experts -> the file's stacks of one matrix an expert, gate before up.
_EXPERTS = {f"{leaf}{end}": tuple(f"{part}.{kind}" for part in parts)
            for leaf, parts in (("gate_up_proj", ("ffn_gate_exps", "ffn_up_exps")), ("down_proj", ("ffn_down_exps",)))
            for end, kind in (("", "weight"), ("_bias", "bias"))}


class GgufNames:
    """The tables for one architecture. Raises CheckpointError if gguf-py does not know it."""

    def __init__(self, architecture: str, blocks: int, config: Mapping[str, Any], where: str) -> None:
        try:
            from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
            from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
        except ImportError as error:
            raise QPassError("GGUF files need the gguf package and Transformers: pip install gguf 'qpass-torch[hf]'"
                             ) from error
        known = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
        if known is None:
            raise CheckpointError(f"{where}: the installed gguf package does not know the architecture "
                                  f"{architecture!r}; update it, or convert the model to safetensors")
        self._map: Any = get_tensor_name_map(known, blocks)
        chosen: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor: Any = chosen(config=dict(config))

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """The file's names for the parameter `name`: one, or several whose rows stand below each other; or none.

        A parameter that is neither weight nor bias may be called a weight there, so that both names are given.
        """
        path, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            path, leaf = name, ""
        while path:
            owner, _, last = path.rpartition(".")
            if not leaf and (parts := _EXPERTS.get(last)) and (block := _BLOCK.search(owner + ".")):
                return tuple(f"blk.{block[1]}.{part}" for part in parts)
            if (found := self._map.get_name(path)) is not None:
                return (f"{found}.{leaf}",) if leaf else (found, f"{found}.weight")
            if "." not in path:
                return ()
            path = path.partition(".")[2]  # some converters start from the model without its head
        return ()

    def rows_of(self, name: str, rows: int) -> Tensor | None:
        """Which row of the file's tensor `name` stands at each row of the parameter; None if they stand as they are.

        Raises QPassError if more was done to it than that.
        """
        before = np.arange(rows, dtype=np.int64).reshape(rows, 1)
        try:
            after = np.asarray(self._processor.process(before.copy(), name).weights)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise QPassError(f"{name} is stored in an arrangement that needs all of it") from error
        if after.shape != before.shape or not np.array_equal(np.sort(after, axis=0), before):
            raise QPassError(f"{name} is stored with other numbers than the model's")
        return None if np.array_equal(after, before) else torch.from_numpy(after[:, 0].copy())

    def restored(self, name: str, weights: Tensor) -> Tensor:
        """The numbers of the file's tensor `name`, decoded, as the model has them."""
        given = weights.float().numpy()
        return torch.from_numpy(np.ascontiguousarray(self._processor.process(given, name).weights))
