"""Cache layers: new keys and values of one attention layer in; all of them so far, quantized, out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qpass import large_pages
from qpass.cache_numbers import CacheNumbers
from qpass.hf.attention import Cached

_STEP = 256  # tokens by which a growing cache is enlarged: it is copied once in so many tokens


class QuantizedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Codes and scales of keys and of values, each [B, H, room, ...]; the tokens from `start` on are in use.

    direct   hand codes to the attention, which must be `qpass`; otherwise keys and values are decoded
    scales   of the keys and the values, for static numbers: tensors that broadcast to [1, H, 1, 1]
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, numbers: CacheNumbers, *, direct: bool, window: int | None = None,
                 scales: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers, self.direct, self.window = numbers, direct, window
        self.is_sliding = window is not None
        self.given = scales
        self.codes: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.start = self.length = self.seen = 0
        self.fixed = False  # whether static scales are those of the tokens that are held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for what comes; static scales are fixed by the first tokens unless they were given."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.scales = []
        for which, states in enumerate((key_states, value_states)):
            self.numbers.width(states.shape[-1])
            if self.given is not None:
                given = self.given[which].to(device=self.device, dtype=torch.float32)
                self.scales.append(given.reshape(1, -1, 1, 1))
            elif self.numbers.static:
                self.scales.append(self.numbers.scale_of(states))
        self.fixed = self.numbers.static
        self.codes = []
        self._make_room(key_states, value_states, self._first_room(key_states.shape[2]))
        self.is_initialized = True

    def _first_room(self, tokens: int) -> int:
        return tokens + _STEP

    def _make_room(self, key_states: Tensor, value_states: Tensor, room: int) -> None:
        b, h = key_states.shape[:2]
        for states in (key_states, value_states):
            size = states.shape[-1]
            self.codes.append(self._zeros((b, h, room, self.numbers.width(size))))
            if not self.numbers.static:
                self.scales.append(torch.zeros(b, h, room, self.numbers.scales(size), dtype=torch.float16,
                                               device=self.device))

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Room for codes; on a CPU in large pages, for every token reads all of them."""
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            return large_pages.zeros(shape, self.numbers.code_dtype)
        return torch.zeros(shape, dtype=self.numbers.code_dtype, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add tokens [B, H, T, D]; returns keys and values of all that the new tokens may see.

        The first ones see themselves as they are: nothing was stored before them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.window is not None and (over := self.length - (self.window - 1)) > 0:
            self.start, self.length = self.start + over, self.length - over
        if self.start + self.length + new > self.codes[0].shape[2]:
            self._enlarge(new)
        at = self.start + self.length
        for which, states in enumerate((key_states, value_states)):
            scale = self.scales[which] if self.numbers.static else self.numbers.scale_of(states)
            self.codes[which][:, :, at:at + new] = self.numbers.encode(states, scale)
            if not self.numbers.static:
                self.scales[which][:, :, at:at + new] = scale
        first = self.seen == 0
        self.length, self.seen = self.length + new, self.seen + new
        if first:
            return key_states, value_states
        return self._used(0), self._used(1)

    def _used(self, which: int) -> Any:
        used = slice(self.start, self.start + self.length)
        scale = self.scales[which] if self.numbers.static else self.scales[which][:, :, used]
        return self._handed(self.codes[which][:, :, used], scale)

    def _handed(self, codes: Tensor, scale: Tensor) -> Any:
        if self.direct:
            return Cached(codes, scale, self.numbers.kind)
        return self.numbers.decode(codes, scale, self.dtype)

    def _enlarge(self, new: int) -> None:
        used = slice(self.start, self.start + self.length)
        for held in (self.codes, self.scales if not self.numbers.static else []):
            for which, tensor in enumerate(held):
                b, h, _, size = tensor.shape
                shape = (b, h, self.length + new + _STEP, size)
                held[which] = self._zeros(shape) if held is self.codes else tensor.new_zeros(shape)
                held[which][:, :, :self.length] = tensor[:, :, used]
        self.start = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(tensor.nbytes for tensor in (*self.codes, *self.scales))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a mask for `query_length` new tokens covers."""
        kept = self.length if self.window is None else min(self.length, self.window - 1)
        return kept + query_length, self.seen - kept

    def get_seq_length(self) -> Any:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        self.codes, self.scales, self.is_initialized = [], [], False
        self.start = self.length = self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as in Transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many tokens to remove as a negative number, got {tokens_to_remove}")
        if self.window is not None and self.seen > self.length and tokens_to_remove:
            raise RuntimeError("a sliding window that is full has forgotten the tokens that would come back")
        self.length, self.seen = max(self.length + tokens_to_remove, 0), max(self.seen + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_batch(lambda tensor: tensor[indices, ...])

    def _each_batch(self, change: Any) -> None:
        self.codes = [change(tensor) for tensor in self.codes]
        if not self.numbers.static:
            self.scales = [change(tensor) for tensor in self.scales]

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.codes = [tensor.to(device, non_blocking=True) for tensor in self.codes]
        self.scales = [tensor.to(device, non_blocking=True) for tensor in self.scales]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.numbers}, {self.seen} tokens, {self.nbytes} bytes)"


class StaticQuantizedCacheLayer(QuantizedCacheLayer):  # type: ignore[no-untyped-call]
    """The same with room for `max_cache_len` tokens from the beginning, written in place, for torch.compile.

    `reset` forgets the tokens; static scales that were not given are those of the first tokens that follow.

    A sliding window keeps all tokens: the mask hides those that are too far away, and the kernel passes over them.
    """

    is_compileable = True

    def __init__(self, numbers: CacheNumbers, *, max_cache_len: int, direct: bool, window: int | None = None,
                 scales: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(numbers, direct=direct, window=window, scales=scales)
        self.max_cache_len = max_cache_len
        self.written = torch.tensor(0, dtype=torch.long)  # a tensor, so that graphs do not depend on its value

    def _first_room(self, tokens: int) -> int:
        return self.max_cache_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.written = self.written.to(self.device)
        if not torch.compiler.is_compiling():  # so that compiled graphs read and write the very tensors
            for tensor in (*self.codes, *self.scales, self.written):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        at = torch.arange(new, device=self.device) + self.written
        if self.numbers.static and not self.fixed:  # after `reset`, in the tensors that graphs hold
            for which, states in enumerate((key_states, value_states)):
                self.scales[which].copy_(self.numbers.scale_of(states))
            self.fixed = True
        self.written.add_(new)
        for which, states in enumerate((key_states, value_states)):
            scale = self.scales[which] if self.numbers.static else self.numbers.scale_of(states)
            self.codes[which].index_copy_(2, at, self.numbers.encode(states, scale))
            if not self.numbers.static:
                self.scales[which].index_copy_(2, at, scale)
        return self._handed(self.codes[0], self.scales[0]), self._handed(self.codes[1], self.scales[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.written if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: what comes next is written over them, and no mask shows them before."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many tokens to remove as a negative number, got {tokens_to_remove}")
        self.written.add_(tokens_to_remove).clamp_(min=0)

    def reset(self) -> None:
        for tensor in self.codes:
            tensor.zero_()
        self.written.zero_()
        self.fixed = self.given is not None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.numbers}, {self.max_cache_len} tokens, {self.nbytes} bytes)"
