"""Reader: a place in a model in; which tensors of a checkpoint it is read from, and how, out. What formats implement.

Asking reads no tensor: everything is decided, and checked, on names, dtypes and shapes. What a read gives is used one
weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpass.formats.checkpoint import Checkpoint
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

_OF_CACHE = frozenset({"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point"})


@dataclass(frozen=True, kw_only=True)
class Place:
    """One weight of a model for which a checkpoint may have numbers, in the checkpoint's own naming.

    path     of the layer, `model.layers.0.mlp.down_proj`; of the parameter itself where that is no layer's `weight`
    name     of the parameter, `model.layers.0.mlp.down_proj.weight`
    shape    (N, K) as multiplied, or as the model stores it if it is no matrix
    classes  names of the owner's class and its bases, nearest first: ("Linear", "Module", ...)
    linear   whether the model multiplies with it, so that it can be packed; else it is decoded to float
    transposed  whether the model stores it [..., K, N], which matters where a checkpoint holds it as the model does
    """

    path: str
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ("Linear",)
    linear: bool = True
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class WeightRead:
    """A quantized weight: its numbers' meaning, its tensors by the reader's own short names, and how to read them.

    `read(tensors, spec)` gets those tensors under the short names, and gives the canonical weight of `spec`; it raises
    ValueError that says which tensor is wrong and how. The canonical tensors may have three more names:
    `input_order` int32 [K], if canonical column i belongs to input input_order[i]; `pre_scale` [K], by which the
    (unpermuted) input is multiplied first; `hadamard`, a number: before that blocks of so many inputs are mixed by
    Sylvester's Hadamard matrix over its norm. A static activation scale stands among `tensors` as
    `input_scale`, and `input_zero_point`. `note` is a sentence for the report.

    `by_rows(tensors, some, spec)`, where rows can be read apart, is `read` of the weight `some` that consists of as
    many rows of the whole, `spec`: from these rows of all tensors [N, ...], and the others whole.
    """

    spec: LinearSpec
    tensors: Mapping[str, str]
    read: Callable[[dict[str, Tensor], LinearSpec], CanonicalWeight]
    note: str = ""
    by_rows: Callable[[dict[str, Tensor], LinearSpec, LinearSpec], CanonicalWeight] | None = None


@dataclass(frozen=True, kw_only=True)
class FloatRead:
    """A weight that becomes a float tensor of the place's shape; `note` says so if the checkpoint's is quantized."""

    tensors: Mapping[str, str]
    read: Callable[[dict[str, Tensor]], Tensor]
    note: str = ""


class Reader:
    """One checkpoint as its format understands it. A format overrides `weight`, and of the rest what it needs.

    storage  how layers that are no nn.Linear store their weight: path -> {"weight", "bias", "transposed"}; `weight` is
             None for a parameter inside a bigger forward. Only checkpoints of qpass say this.
    tied     tables of embeddings that read the rows of a packed head, by name -> the head; again of qpass only
    recipe   the recipe that made the checkpoint, for the report, if it says
    """

    storage: Mapping[str, Mapping[str, Any]] = {}
    tied: Mapping[str, str] = {}
    recipe: Mapping[str, Any] | None = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        """How to read this weight; None if the checkpoint holds it as it is, under its own name.

        Raises CheckpointError, naming the layer and both sides, where the config and the files disagree.
        """
        raise NotImplementedError

    def stack(self, place: Place) -> tuple[WeightRead, ...]:
        """How to read one matrix of those stacked at `place`, whose shape is [E, N, K] as multiplied; () if the files
        hold no such stack, or hold it in float.

        The tensors of such a read have E in front in the files, and are given without it, one matrix's. Of two reads
        the first gives the gate's rows, the second up's; one read gives rows in the order in which the model stores
        them. Raises CheckpointError as `weight` does.
        """
        return ()

    def float_parts(self, place: Place) -> tuple[str, ...]:
        """The tensors that make up a parameter of experts which the files hold in float under other names, gate before
        up: stacks [E, N, K] of matrices, whatever way the model stores them, or rows [E, N] of biases; () if none do.

        Raises CheckpointError as `weight` does.
        """
        return ()

    def shape_of(self, path: str) -> tuple[int, int] | None:
        """(N, K) of the quantized weight at `path`, from headers alone; None if none is there. For `qpass inspect`."""
        return None

    def listed(self) -> Iterator[tuple[str, tuple[int, ...], WeightRead | FloatRead]]:
        """Path, shape and read of each quantized weight, from headers alone: [N, K], or [E, N, K] of a stack, whose
        read is that of one matrix. For `qpass inspect`."""
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.checkpoint.tensors):
            shape = self.shape_of(path)
            read = None if shape is None else self.weight(Place(path=path, name=f"{path}.weight", shape=shape))
            if shape is not None and read is not None:
                yield path, shape, read

    def leftover(self, name: str) -> str | None:
        """Why a tensor that no weight was read from does no harm, as a phrase for the report; None if it does."""
        return None

    def spare(self, name: str) -> str | None:
        """`leftover`, or what any format may have beside its weights: scales of the cache, read by QuantizedCache."""
        if (why := self.leftover(name)) is None and name.rpartition(".")[2] in _OF_CACHE:
            return "a scale of the KV cache, which is kept in the model's dtype unless it is a QuantizedCache"
        return why

    def unmatched(self, paths: Iterable[str]) -> str | None:
        """A sentence if the checkpoint calls layers quantized that are not among `paths`, those that were read."""
        return None
