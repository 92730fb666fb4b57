"""Inspect: a checkpoint in; what it is, layer by layer, and what would run here out, from configs and headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from qpass.errors import CheckpointError, NoKernel
from qpass.formats.checkpoint import Checkpoint, understood
from qpass.formats.format_registry import Format, open_checkpoint
from qpass.formats.reader import Reader, WeightRead
from qpass.kernels.keep_activation import computable
from qpass.kernels.registry import LinearCall, choose
from qpass.reports.bands import pattern, without_indices
from qpass.reports.text_table import Column, human_bytes, text_table
from qpass.spec import LinearSpec, effective_text

_COLUMNS: tuple[Column, ...] = (("n", ">"), ("layer", "<"), ("shape", ">"), ("numbers", "<"), ("stored", ">"),
                                ("would run on", "<"))


@dataclass(frozen=True, kw_only=True)
class LayerFound:
    """One quantized layer: its path and shape, what its numbers are, its bytes on disk, and the kernel it would get."""

    path: str
    shape: tuple[int, ...]
    numbers: str
    nbytes: int
    kernel: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is. `str()` is a table; layers that differ only in a number share a line.

    `format` is None for a float model; `not_used` maps reasons to tensors that loading would pass over.
    """

    path: str
    format: str | None
    model: str
    layers: tuple[LayerFound, ...]
    nbytes: int
    tensors: int
    not_used: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        what = "a float model" if self.format is None else self.format
        packed = sum(layer.nbytes for layer in self.layers)
        lines = [f"{self.path}: {what}, {self.model}, {human_bytes(self.nbytes)} in {self.tensors} tensors"]
        if self.layers:
            groups: dict[tuple[object, ...], list[LayerFound]] = {}
            for layer in self.layers:
                key = (without_indices(layer.path), layer.shape, layer.numbers, layer.kernel)
                groups.setdefault(key, []).append(layer)
            rows = [(str(len(group)), pattern([layer.path for layer in group]), "x".join(map(str, group[0].shape)),
                     group[0].numbers, human_bytes(sum(layer.nbytes for layer in group)), group[0].kernel)
                    for group in groups.values()]
            lines += [text_table(_COLUMNS, rows), f"{len(self.layers)} quantized layers take {human_bytes(packed)}, "
                      f"the rest {human_bytes(self.nbytes - packed)}"]
        lines += [f"not used: {why} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
                  for why, names in self.not_used.items()]
        return "\n".join(lines)


def inspect(where: str | os.PathLike[str]) -> Inspection:
    """Say what a checkpoint is, without reading its weights and without Transformers.

    Kernels are those that would be chosen on this machine's CPU. Raises CheckpointError, as `load` would, for what
    cannot be read.
    """
    chosen, checkpoint = open_checkpoint(where)
    with understood(checkpoint.path):
        reader = None if chosen is None else chosen.reader(checkpoint)
        layers = [] if reader is None else _layers(checkpoint, reader)
    not_used: dict[str, list[str]] = {}
    for name in checkpoint.tensors if reader is not None else ():
        if (why := reader.spare(name)) is not None:  # type: ignore[union-attr]
            not_used.setdefault(why, []).append(name)
    named = checkpoint.config.get("architectures") or [checkpoint.source.metadata.get("general.architecture") or
                                                       "no architecture named"]
    model = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    return Inspection(path=str(checkpoint.path), format=None if chosen is None else _title(chosen), model=model,
                      layers=tuple(layers), tensors=len(checkpoint.tensors),
                      nbytes=sum(stored.nbytes for stored in checkpoint.tensors.values()),
                      not_used={why: tuple(names) for why, names in not_used.items()})


def _title(made: Format) -> str:
    return made.title if made.title == made.name else f"{made.title} ({made.name})"


def _layers(checkpoint: Checkpoint, reader: Reader) -> list[LayerFound]:
    found = []
    for path, shape, read in reader.listed():
        nbytes = sum(checkpoint.tensors[name].nbytes for name in read.tensors.values())
        numbers, kernel = "decoded to float", "none"
        if isinstance(read, WeightRead):
            numbers, kernel = effective_text(read.spec), _kernel(read.spec)
        found.append(LayerFound(path=path, shape=shape, numbers=numbers, nbytes=nbytes, kernel=kernel))
    return found


@lru_cache(maxsize=256)  # of hundreds of layers most are alike
def _kernel(asked: LinearSpec) -> str:
    call = LinearCall(spec=asked, device="cpu", dtype="bfloat16")
    try:
        spec, kept = computable(call)
        name = choose(replace(call, spec=spec)).kernel.name
    except (NoKernel, CheckpointError) as error:
        return str(error).splitlines()[0]
    return f"{name} ({kept})" if kept else name
