"""GGUF saving: a Transformers model with packed layers in; the metadata and tensors of a GGUF file out.

Keys and names come from the tables of Transformers and gguf-py, read the other way round; rows that llama.cpp wants
interleaved are put so while they are integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError, QPassError
from qpass.formats.gguf_config import EXPERT_SIZES, read_config
from qpass.formats.gguf_file import read_gguf
from qpass.formats.gguf_names import GgufNames
from qpass.formats.gguf_save_experts import expert_entries
from qpass.formats.gguf_vocabulary import vocabulary
from qpass.formats.gguf_write import GgufEntry, plain_bytes, weight_bytes, weight_kind, write_gguf
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight

# Fields of a config that change what is computed, and that some architectures of llama.cpp take as given.
_MEANS = ("norm_topk_prob", "hidden_act", "num_experts_per_tok", "head_dim", "scoring_func")


def save_gguf(model: nn.Module, path: str | PathLike[str], *, tokenizer: Any = None) -> Path:
    """Write `model` to the file `path` (`model.gguf` in it if it is a folder) and return the file's path.

    Symmetric integers of up to 4 bits become Q4_0, asymmetric ones Q4_1, more bits Q8_0, groups of a multiple of 32;
    the numbers are the same where float16 holds the scales. Everything else is written as floats. Raises
    CheckpointError, naming the layer, for what GGUF or llama.cpp's architectures cannot hold.
    """
    target = Path(path).expanduser()
    if target.suffix != ".gguf":
        target.mkdir(parents=True, exist_ok=True)
        target = target / "model.gguf"
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise CheckpointError("only Transformers models are written to GGUF: their config says what the file must")
    architecture, metadata = _metadata(config)
    if tokenizer is not None:
        metadata |= vocabulary(tokenizer, config.get_text_config().vocab_size)
    names = GgufNames(architecture, int(config.num_hidden_layers), config.to_dict(), "the model")
    entries = list(_entries(model, names))
    partial = target.with_name(target.name + ".partial")
    try:
        write_gguf(partial, metadata, entries)
        _check_config(config, partial, architecture)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_config(config: Any, written: Path, architecture: str) -> None:
    """Raise CheckpointError if the model computes in a way that a file of this architecture cannot say."""
    read = read_config(read_gguf(written))
    for name in _MEANS:
        before, after = getattr(config, name, None), getattr(read, name, None)
        if before != after and name in config.to_dict() and name in read.to_dict():
            raise CheckpointError(f"{name} is {before!r}, and every GGUF of {architecture!r} means {after!r}; "
                                  "whatever runs it would compute something else. Save the model as compressed-tensors")


def _metadata(config: Any) -> tuple[str, dict[str, Any]]:
    """The architecture in llama.cpp's words, and the keys that Transformers would read the config from."""
    try:
        from gguf import MODEL_ARCH_NAMES
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    except ImportError as error:
        raise QPassError("writing GGUF needs the gguf package: pip install gguf 'qpass-torch[hf]'") from error
    kind = config.model_type
    table: Any = GGUF_CONFIG_MAPPING.get(kind) or GGUF_CONFIG_MAPPING.get(kind.replace("_", ""))
    spelled = {kind, kind.replace("_", ""), kind.replace("_", "-")}
    architecture = next((name for name in MODEL_ARCH_NAMES.values() if name in spelled), None)
    if table is None or architecture is None:
        raise CheckpointError(f"models of type {kind!r} have no table of GGUF keys in the installed Transformers and "
                              "gguf packages, so they cannot be written")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear"):
        raise CheckpointError(f"rotary embeddings of type {rope['rope_type']!r} need a tensor of frequencies in GGUF, "
                              "which this version does not write")
    found: dict[str, Any] = {"general.architecture": architecture, "general.quantization_version": 2,
                             "general.name": str(getattr(config, "_name_or_path", "") or kind)}
    for key, name in (table | EXPERT_SIZES).items():
        value = rope.get(name, getattr(config, name, None)) if name is not None else None
        if value is None and name == "head_dim":
            value = config.hidden_size // config.num_attention_heads
        if isinstance(value, bool | int | float) or (isinstance(value, list) and value):
            found[f"{architecture}.{key}"] = value
    if rope.get("rope_type") == "linear":
        found |= {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": float(
            rope["factor"])}
    return architecture, found


def _entries(model: nn.Module, names: GgufNames) -> Iterator[GgufEntry]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, QuantExperts):
            yield from expert_entries(path, module, names)
        if isinstance(module, PackedWeight):
            if id(module._buffers) not in seen:
                seen.add(id(module._buffers))
                yield _packed(f"{path}.weight", module, names)
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _float(f"{path}.{leaf}", parameter, names)


def _name(name: str, names: GgufNames) -> str:
    found = names.tensors_of(name)
    if len(found) != 1:
        raise CheckpointError(f"{name} has no tensor of its own in GGUF; experts, and layers that its architecture "
                              "does not have, cannot be written")
    return found[0]


def _float(name: str, parameter: Tensor, names: GgufNames) -> GgufEntry:
    there = _name(name, names)
    value = parameter.detach()
    if value.dim() == 1:
        probe = torch.zeros_like(value, dtype=torch.float32, device="cpu")
        try:
            shift = names.restored(there, probe)  # what the loader adds: converters store some norms plus one
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{name} is stored otherwise in GGUF: {error}") from error
        value = value.float().cpu() - shift.reshape(value.shape)
    rows = _rows(there, name, value.shape[0], names) if value.dim() == 2 else None
    kind, _ = plain_bytes(value[:1])
    made = value if rows is None else value[rows]
    return GgufEntry(name=there, kind=kind if value.dim() > 1 else "F32", shape=tuple(value.shape),
                     make=lambda: plain_bytes(made)[1])


def _packed(name: str, layer: PackedWeight, names: GgufNames) -> GgufEntry:
    there, spec = _name(name, names), layer.spec
    rows = _rows(there, name, spec.out_features, names)
    n, k = spec.shape
    moved = any(getattr(layer, name, None) is not None for name in ("input_order", "pre_scale", "hadamard"))
    kind = None if moved else weight_kind(spec)
    if kind is None:
        float_kind = plain_bytes(torch.empty(1, 1, dtype=layer.dtype))[0]
        return GgufEntry(name=there, kind=float_kind, shape=(n, k),
                         make=lambda: plain_bytes(_ordered(layer.dequantize(), rows))[1])
    return GgufEntry(name=there, kind=kind, shape=(n, k),
                     make=lambda: weight_bytes(layer.canonical(), spec, kind, rows))


def _rows(there: str, name: str, count: int, names: GgufNames) -> Tensor | None:
    """Which row of the parameter stands at each row of the file's tensor."""
    try:
        rows = names.rows_of(there, count)
    except QPassError as error:
        raise CheckpointError(f"{name} cannot be written to GGUF: {error}") from error
    return None if rows is None else rows.argsort()


def _ordered(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows.to(tensor.device)]
