"""Decision: what a recipe comes to for one site: quantized how, by which rule and kernel, or left, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qpass.scheme import Scheme
from qpass.site import Site
from qpass.spec import LinearSpec


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the recipe says of one site.

    status    "quantize"; "keep" (the recipe leaves it in float); "refuse" (asked for, but it cannot be done)
    scheme    as asked; None if nothing asked for one
    spec      set exactly if status is "quantize": group size resolved, `kernel` the one chosen
    reason    "" where the outcome is simply what the rule asked
    kernel    the kernel of a layer of experts; `spec.kernel` then names the layout of its blocks
    experts   where experts of one weight differ: a spec, or None for float, for each; () if all have `spec`
    bytes_*   of the weight as stored, scales and zero points included. What a tied head and its table of embeddings
              share is counted once: at the table in float, at the head when it is packed
    bytes_packed    the same in memory, as the kernel wants it
    bytes_a_token   what decoding one token reads of it: one row of a table, all of anything else
    """

    site: Site
    status: Literal["quantize", "keep", "refuse"]
    rule: str
    scheme: Scheme | None = None
    spec: LinearSpec | None = None
    reason: str = ""
    refusals: dict[str, str] = field(default_factory=dict)
    kernel: str | None = None
    experts: tuple[LinearSpec | None, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_packed: int = 0
    bytes_a_token: int = 0

    def spec_of(self, expert: int) -> LinearSpec | None:
        """The spec of one expert's weight; None if it stays float."""
        return self.experts[expert] if self.experts else self.spec
