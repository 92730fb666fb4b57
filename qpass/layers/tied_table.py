"""Tied table: the embedding of a model whose head is packed: its rows are read from the head's packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.layers.packed_layers import PackedWeight
from qpass.layers.quant_weight import QuantWeight


class TiedTable(QuantWeight):
    """Stands as `weight` of an nn.Embedding and answers `F.embedding` with rows of `head`, dequantized.

    It holds no numbers of its own. On disk and in `state_dict()` it is the float table that its rows are, untied, which
    is what vLLM and Transformers read; loading a state dict takes the rows from the head and passes over the table.
    """

    def __init__(self, head: PackedWeight) -> None:
        torch.nn.Module.__init__(self)
        self.dtype, self.transposed, self.training = head.dtype, False, False
        self._tied = []
        self.tie(head)

    def rows(self, ids: Tensor) -> Tensor:
        """ids integer [...] -> [..., K] in the dtype that the float table had."""
        return torch.ops.qpass.embedding(ids, self.packed, self._spec_text, self.dtype)  # type: ignore[no-any-return]

    def tensors_on_disk(self) -> dict[str, Tensor]:
        raise NotImplementedError("a tied table is written whole, by `dequantize`")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = (
            torch.empty(self.shape, dtype=self.dtype, device="meta") if self.device.type == "meta" else
            self.dequantize())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        key = prefix.removesuffix(".")
        if key in unexpected_keys:  # the embedding, which has a module where the key says parameter, put it there
            unexpected_keys.remove(key)
