"""Cache numbers: keys or values [B, H, S, D] in; codes and scales as a quantized cache holds them out, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qpass.errors import RecipeError

Kind = Literal["int8", "fp8", "int4"]
_LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}  # e4m3 ends at 448; the integers are symmetric
_GRANULARITIES = ("per_token", "per_head", "per_tensor", "per_group")


@dataclass(frozen=True, kw_only=True)
class CacheNumbers:
    """What a cache stores of each number.

    kind         int8, fp8 (e4m3) or int4
    granularity  per_token: a float16 scale for each token of each head, from its own largest number
                 per_group: one for each `group_size` numbers of such a token
                 per_head, per_tensor: float32 scales that a checkpoint gives, or else the first tokens; what comes
                 later and is larger saturates
    """

    kind: Kind = "int8"
    granularity: Literal["per_token", "per_head", "per_tensor", "per_group"] = "per_token"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _LARGEST:
            raise RecipeError(f"a cache holds {', '.join(_LARGEST)}, got {self.kind!r}")
        if self.granularity not in _GRANULARITIES:
            raise RecipeError(f"scales of a cache are {', '.join(_GRANULARITIES)}, got {self.granularity!r}")
        if (self.granularity == "per_group") != (self.group_size is not None) or (self.group_size or 8) % 8:
            raise RecipeError("group_size, a multiple of 8, goes with granularity='per_group', and only with it; got "
                              f"{self.granularity!r} and {self.group_size}")
        if self.kind == "int4" and self.granularity != "per_group":
            raise RecipeError(f"int4 is too coarse for scales {self.granularity}; use per_group")

    @property
    def static(self) -> bool:
        """Whether scales are those of the whole cache, not of each token."""
        return self.granularity in ("per_head", "per_tensor")

    def width(self, size: int) -> int:
        """Bytes of codes for one token of one head of `size` numbers. Raises RecipeError if they cannot be stored."""
        if (self.kind == "int4" and size % 2) or size % (self.group_size or 1):
            raise RecipeError(f"heads of {size} numbers cannot be stored as {self.kind} in groups of "
                              f"{self.group_size}; choose another group_size")
        return size // 2 if self.kind == "int4" else size

    def scales(self, size: int) -> int:
        """How many scales one token of one head has."""
        return size // self.group_size if self.group_size else 1

    def scale_of(self, states: Tensor) -> Tensor:
        """amax / largest of `states`: [B, H, S, scales] float16, [1, H, 1, 1] or [1, 1, 1, 1] float32."""
        size = states.abs()
        if self.granularity == "per_tensor":
            amax = size.amax().view(1, 1, 1, 1)
        elif self.granularity == "per_head":
            amax = size.amax((0, 2, 3)).view(1, -1, 1, 1)
        else:
            amax = size.unflatten(-1, (self.scales(states.shape[-1]), -1)).amax(-1)
        scale = amax.float() / _LARGEST[self.kind]
        # 2^-24 and 65504 are the ends of float16
        return scale.clamp(min=1e-30) if self.static else scale.clamp(2.0**-24, 65504.0).half()

    def encode(self, states: Tensor, scale: Tensor) -> Tensor:
        """Codes [B, H, S, width]: int8; the bits of e4m3 as uint8; two int4 a byte, the first half of a row low."""
        q = states.float() / self._spread(scale, states.shape[-1])
        most = _LARGEST[self.kind]
        if self.kind == "fp8":
            return q.clamp(-most, most).to(torch.float8_e4m3fn).view(torch.uint8)
        q = q.round().clamp(-most, most)
        if self.kind == "int8":
            return q.to(torch.int8)
        low, high = (q + 8).to(torch.uint8).chunk(2, dim=-1)
        return low | (high << 4)

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers again, [B, H, S, D] in `dtype`."""
        if self.kind == "fp8":
            q = codes.view(torch.float8_e4m3fn).float()
        elif self.kind == "int8":
            q = codes.float()
        else:
            q = torch.cat((codes & 15, codes >> 4), dim=-1).float() - 8
        return (q * self._spread(scale, q.shape[-1])).to(dtype)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.kind == "int8" else torch.uint8

    def _spread(self, scale: Tensor, size: int) -> Tensor:
        scale = scale.float()
        return scale if scale.shape[-1] == 1 else scale.repeat_interleave(size // scale.shape[-1], dim=-1)

    def __str__(self) -> str:
        return f"{self.kind} {self.granularity}" + (f" {self.group_size}" if self.group_size else "")


def numbers_of(kind: str, groups: int) -> CacheNumbers:
    """Numbers of this kind whose rows have `groups` scales, for decoding, to which it is equal who shares them."""
    if kind == "int4" or groups > 1:
        return CacheNumbers(kind=kind, granularity="per_group", group_size=8)  # type: ignore[arg-type]
    return CacheNumbers(kind=kind)  # type: ignore[arg-type]
