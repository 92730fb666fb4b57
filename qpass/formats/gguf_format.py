"""GGUF: one file of llama.cpp, with its config, tokenizer and tensors, to packed weights; every type is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpass.dtype import itemsize
from qpass.errors import CheckpointError, QPassError
from qpass.formats.checkpoint import Checkpoint, Stored, check_inside
from qpass.formats.codec_reads import spec_of
from qpass.formats.format_registry import Format, register_format
from qpass.formats.gguf_config import architecture_of, empty_model, read_config
from qpass.formats.gguf_file import MAGIC, PLAIN, GgufFile
from qpass.formats.gguf_names import GgufNames
from qpass.formats.gguf_split import first_of, read_whole
from qpass.formats.gguf_types import args_of, unpack_blocks
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.formats.safetensors_file import is_transformers_folder
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight

if TYPE_CHECKING:
    from torch import Tensor, nn

_UNKNOWN = "how its module computes with experts is not known"


class GgufSource:
    """The tensors of a GGUF file under its own names; quantized ones are uint8, one row of blocks a row."""

    def __init__(self, path: Path) -> None:
        self.file: GgufFile = read_whole(path)
        self.metadata: Mapping[str, Any] = self.file.metadata
        self.tensors: Mapping[str, Stored] = {
            name: Stored(file=self.file.holder(name).path, version=self.file.holder(name).version,
                         dtype=PLAIN.get(info.kind, "uint8"),
                         shape=info.shape if info.kind in PLAIN else (*info.shape[:-1], info.row_bytes))
            for name, info in self.file.tensors.items()}

    def read(self, names: Iterable[str], at: int | None = None) -> dict[str, Tensor]:
        return {name: self.file.read(name, at) for name in names}


class GgufReader(Reader):
    """Names are translated when asked for; rows are put back in the model's order while blocks are still packed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if not isinstance(checkpoint.source, GgufSource):
            raise CheckpointError(f"{checkpoint.path} is no GGUF file")
        self.file = checkpoint.source.file
        self._names: GgufNames | None = None

    @property
    def names(self) -> GgufNames:
        if self._names is None:
            architecture = architecture_of(self.file)
            blocks = int(self.file.metadata.get(f"{architecture}.block_count", 0))
            config = read_config(self.file)
            self._names = GgufNames(architecture, blocks, config.to_dict(), str(self.file.path))
        return self._names

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        names = [name for name in self.names.tensors_of(place.name) if name in self.file.tensors]
        if not names:
            return None
        if len(names) > 1 or len(self.file.tensors[names[0]].shape) == 3:
            return self._stacks(names, place)
        name = names[0]
        info = self.file.tensors[name]
        if info.kind in PLAIN or len(info.shape) != 2:
            return self._plain(name, place)
        if info.shape != place.shape:
            raise CheckpointError(f"{name} in {self.file.path} is {list(info.shape)}, the model's {place.name} is "
                                  f"{list(place.shape)}")
        args = args_of(info.kind)
        spec = spec_of(args, info.shape)
        try:
            rows = self.names.rows_of(name, info.shape[0])
        except QPassError as error:
            return self._decoded(name, place, str(error))

        def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
            raw = tensors["blocks"] if rows is None else tensors["blocks"][rows]
            return CanonicalWeight(unpack_blocks(raw, info.kind))

        return WeightRead(spec=spec, tensors={"blocks": name}, read=read)

    def _plain(self, name: str, place: Place) -> FloatRead:
        def read(tensors: dict[str, Tensor]) -> Tensor:
            return self.names.restored(name, tensors["plain"]).reshape(place.shape)

        count = 1
        for size in place.shape:
            count *= size
        info = self.file.tensors[name]
        if info.kind not in PLAIN:
            return self._decoded(name, place, "only matrices are packed")
        if count * itemsize(PLAIN[info.kind]) != info.nbytes:
            raise CheckpointError(f"{name} in {self.file.path} is {list(info.shape)}, the model's {place.name} is "
                                  f"{list(place.shape)}")
        return FloatRead(tensors={"plain": name}, read=read)

    def _decoded(self, name: str, place: Place, why: str) -> FloatRead:
        def read(tensors: dict[str, Tensor]) -> Tensor:
            return self.names.restored(name, self._float(name, tensors["blocks"])).reshape(place.shape)

        return FloatRead(tensors={"blocks": name}, read=read, note=f"decoded to float: {why}")

    def stack(self, place: Place) -> tuple[WeightRead, ...]:
        names = [name for name in self.names.tensors_of(place.name) if name in self.file.tensors]
        infos = [self.file.tensors[name] for name in names]
        if any(info.kind in PLAIN or len(info.shape) != 3 for info in infos):
            return ()
        self._check_stacks(names, place)
        return tuple(self._one_of_stack(name) for name in names)

    def float_parts(self, place: Place) -> tuple[str, ...]:
        names = [name for name in self.names.tensors_of(place.name) if name in self.file.tensors]
        if not names or any(self.file.tensors[name].kind not in PLAIN for name in names):
            return ()
        shapes = [self.file.tensors[name].shape for name in names]
        rows = [(shape[0], sum(s[1] for s in shapes), *shape[2:]) for shape in shapes if len(shape) == len(place.shape)]
        if set(rows) != {place.shape} or len(rows) != len(names):
            raise self._misfit(names, place)
        return tuple(names)

    def _one_of_stack(self, name: str) -> WeightRead:
        info = self.file.tensors[name]

        def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
            return CanonicalWeight(unpack_blocks(tensors["blocks"], info.kind))

        return WeightRead(spec=spec_of(args_of(info.kind), info.shape[-2:]), tensors={"blocks": name}, read=read)

    def listed(self) -> Iterator[tuple[str, tuple[int, ...], WeightRead | FloatRead]]:
        for name, info in self.file.tensors.items():
            if info.kind not in PLAIN and len(info.shape) in (2, 3):
                yield name.removesuffix(".weight"), info.shape, self._one_of_stack(name)

    def _check_stacks(self, names: list[str], place: Place) -> None:
        shapes = [self.file.tensors[name].shape for name in names]
        experts, _, k = place.shape if len(place.shape) == 3 else (0, 0, 0)
        if names and (any(len(s) != 3 or (s[0], s[2]) != (experts, k) for s in shapes)
                      or sum(s[1] for s in shapes) != place.shape[1]):
            raise self._misfit(names, place)

    def _misfit(self, names: list[str], place: Place) -> CheckpointError:
        shapes = [list(self.file.tensors[name].shape) for name in names]
        return CheckpointError(f"{', '.join(names)} in {self.file.path} are {shapes}, which do not make up "
                               f"{place.name} {list(place.shape)}")

    def _stacks(self, names: list[str], place: Place) -> FloatRead:
        """Matrices of every expert: [E, rows, K] of each name, their rows below each other."""
        self._check_stacks(names, place)
        quantized = any(self.file.tensors[name].kind not in PLAIN for name in names)

        def read(tensors: dict[str, Tensor]) -> Tensor:
            return torch.cat([self._float(name, tensors[name]) for name in names], dim=1)

        return FloatRead(tensors={name: name for name in names}, read=read,
                         note=f"decoded to float: {_UNKNOWN}" if quantized else "")

    def _float(self, name: str, raw: Tensor) -> Tensor:
        """A tensor of any type and number of dimensions, decoded to float32."""
        info = self.file.tensors[name]
        if info.kind in PLAIN:
            return raw.float()
        args = args_of(info.kind)
        flat = raw.view(-1, raw.shape[-1])
        spec = spec_of(args, (flat.shape[0], info.shape[-1]))
        return dequantize_weight(CanonicalWeight(unpack_blocks(flat, info.kind)), spec).view(info.shape)

    def leftover(self, name: str) -> str | None:
        # Frequencies that llama.cpp wants as a tensor; Transformers computes the same from the config (gguf_rope.py).
        return "computed from the config" if name.endswith(("rope_freqs.weight", "attn_rot_embd.weight")) else None


def _file_of(path: Path) -> Path | None:
    """The file itself, or the only GGUF model of a folder that holds no other; None if there is none."""
    if path.is_dir():
        return None if is_transformers_folder(path) else first_of(sorted(path.glob("*.gguf")))
    if not path.is_file():  # a pipe would never end
        return None
    with open(path, "rb") as file:
        return path if file.read(4) == MAGIC else None


def _claims(path: Path, config: Mapping[str, Any]) -> bool:
    return path.exists() and _file_of(path) is not None


def _source(path: Path, allow_pickle: bool) -> GgufSource:
    file = _file_of(path) or path
    if path.is_dir():
        check_inside(file)
    return GgufSource(file)


def _empty(checkpoint: Checkpoint) -> nn.Module:
    assert isinstance(checkpoint.source, GgufSource)
    file = checkpoint.source.file
    return empty_model(file, read_config(file))


register_format(Format(
    name="gguf", title="GGUF", methods=("gguf",), reader=GgufReader, claims=_claims,
    source=_source, empty_model=_empty,
    reads="Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ1 to IQ4, TQ1_0, TQ2_0, MXFP4, NVFP4, F16, BF16, F32",
    runs="Q4_0, Q5_0, Q8_0, Q6_K as int4, int5, int8, int6; the others as stored"))
