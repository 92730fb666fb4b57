"""Input change: what a layer does to its input before the product, as data; x [..., K] in, x changed out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qpass.hadamard import multiply_blocks


@dataclass(frozen=True, kw_only=True, eq=False)
class InputChange:
    """x -> (x H) * scale, in this order, whichever of the two there is; the weight has taken up the inverse.

    hadamard  K is mixed in blocks of so many channels, a power of two that divides it, by Sylvester's Hadamard matrix
    scale     [K], channel by channel, in the dtype in which it is stored
    """

    hadamard: int | None = None
    scale: Tensor | None = None

    def __bool__(self) -> bool:
        return self.hadamard is not None or self.scale is not None

    def __call__(self, x: Tensor) -> Tensor:
        if self.hadamard is not None:
            x = multiply_blocks(x, self.hadamard)
        return x if self.scale is None else x * self.scale.to(device=x.device, dtype=x.dtype)

    @property
    def told(self) -> str:
        """In words, for a report; "" if nothing is changed."""
        words = []
        if self.hadamard is not None:
            words.append(f"mixed in blocks of {self.hadamard} by a Hadamard matrix")
        if self.scale is not None:
            words.append("scaled channel by channel")
        return f"its input is {' and '.join(words)} at run time" if words else ""
