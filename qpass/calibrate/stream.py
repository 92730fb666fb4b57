"""Stream: a tensor whose channels any rotation may mix, as the parameters that must be rotated with it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NormVector:
    """A parameter [K] of a norm: its weight less `offset`, or its bias. `dim`: the one along the channels."""

    parameter: str
    offset: float = 0.0
    dim: int = -1


@dataclass(frozen=True)
class Norm:
    """What a norm multiplies its rows by and adds to them; None where it does neither."""

    weight: NormVector | None = None
    bias: NormVector | None = None


@dataclass(frozen=True)
class Reader:
    """A product's weight, its dim that meets the stream, the norm that its inputs come through, its bias, and the path
    of the module that multiplies."""

    weight: str
    dim: int
    norm: Norm
    bias: str | None
    owner: str


@dataclass(frozen=True)
class Writer:
    """A parameter, and its dim that runs along the stream's channels. `table`: its rows are looked up."""

    parameter: str
    dim: int
    table: bool = False


Role = Reader | Writer | NormVector


@dataclass(eq=False)
class Stream:
    """`pinned`: why it cannot be rotated, or "". `keeps_mean`: a norm subtracts the mean of its rows."""

    width: int
    readers: list[Reader] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    keeps_mean: bool = False
    pinned: str = ""
    joined: Stream | None = None

    def root(self) -> Stream:
        """The stream that this one was found to be a part of, or itself."""
        return self if self.joined is None else self.joined.root()

    def pin(self, why: str) -> None:
        root = self.root()
        root.pinned = root.pinned or why

    def join(self, other: Stream) -> None:
        """Make the two one."""
        one, two = self.root(), other.root()
        if one is not two:
            one.readers += two.readers
            one.writers += [writer for writer in two.writers if writer not in one.writers]
            one.keeps_mean |= two.keeps_mean
            one.pinned = one.pinned or two.pinned
            two.joined = one
