"""Rotation: the settings of the one algorithm that changes the whole model before its layers are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qpass.recipes.algorithm_table import Algorithm, register_algorithm

_PROBE = 64  # tokens, where there is no data: on them the model is compared with what it was


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class Rotation(Algorithm):
    """Rotations (QuaRot, Ashkboos et al., 2024): channels of the residual stream mixed by a random Hadamard matrix.

    No channel is then much larger than the others, in weights and in activations. The graph shows what writes and reads
    the stream; norms' weights move into the products that follow them. The model computes the same, and none of its
    classes changes; a head tied to the embeddings is untied, which the report says. Streams that no rotation can be
    taken through (a norm's output that is itself added on) stay as they are, and are named. It stands first.
    """

    name: ClassVar[str] = "rotation"
    needs_data: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True
    propagate: ClassVar[bool] = False

    @property
    def drawn_tokens(self) -> int:
        """For one comparison."""
        return _PROBE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(not self.targets, "targets", "left out: a rotation goes through the whole model")
