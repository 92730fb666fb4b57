"""Rotation: the settings of the one algorithm that changes the whole model before its layers are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qpass.recipes.algorithm_table import Algorithm, register_algorithm

ROTATIONS = ("R1", "R2", "R4")
_PROBE = 64  # tokens, where there is no data: on them the model is compared with what it was


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class Rotation(Algorithm):
    """Rotations (QuaRot, Ashkboos et al., 2024; SpinQuant, Liu et al., 2024): channels mixed by Hadamard matrices.

    No channel is then much larger than the others, in weights and in activations. The graph shows what writes and reads
    what is mixed; the model computes the same, and none of its classes changes. It stands first.

    rotations  which, by SpinQuant's names. R1: the residual stream, by a random matrix folded into the weights; norms'
               weights move into the products that follow them, and a head tied to the embeddings is untied, which the
               report says. R2: the values of each attention head, folded into the products before and after. R4: the
               inputs of products that follow an activation function (the down projections), when the model runs, in
               blocks of the largest power of two that divides them; a compiler sees plain products of small matrices.
    block      the size of R4's blocks at the most; None sets no limit

    What no rotation can be taken through (a norm's output that is itself added on; heads whose values are scaled) stays
    as it is, and is named.
    """

    name: ClassVar[str] = "rotation"
    needs_data: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True
    propagate: ClassVar[bool] = False
    rotations: tuple[str, ...] = ("R1",)
    block: int | None = None

    @property
    def drawn_tokens(self) -> int:
        """For one comparison."""
        return _PROBE

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rotations, (list, tuple)):
            object.__setattr__(self, "rotations", tuple(str(name).upper() for name in self.rotations))
        self.check(isinstance(self.rotations, tuple) and bool(self.rotations) and set(self.rotations) <= set(ROTATIONS)
                   and len(set(self.rotations)) == len(self.rotations), "rotations",
                   f"a list of {', '.join(ROTATIONS)}, each once")
        self.check(self.block is None or (type(self.block) is int and self.block > 1
                                          and self.block & (self.block - 1) == 0), "block", "None or a power of two")
        self.check(not self.targets, "targets", "left out: a rotation goes through the whole model")
