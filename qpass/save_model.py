"""Save: a quantized model in, a folder of safetensors and config.json out, as Transformers and vLLM read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qpass.checkpoints.publish_folder import publish_folder
from qpass.errors import CheckpointError
from qpass.formats.compressed_tensors_config import METHOD
from qpass.formats.compressed_tensors_config_writer import write_config
from qpass.formats.layer_writer import LayerWriter, Writable, writable_layers
from qpass.formats.safetensors_file import INDEX, SINGLE, Entry, split_shards, write_file
from qpass.formats.writer_table import writers
from qpass.hf.model_config import save_config
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer
from qpass.layers.tied_table import TiedTable
from qpass.swap.swap_site import TRIM_AFTER, give_back_freed_memory

_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save(model: nn.Module, folder: str | PathLike[str], *, tokenizer: Any = None,
         max_shard_size: int | str = "5GB", format: str = "compressed-tensors") -> Path:
    """Write `model` to `folder` and return its path; the folder appears, or changes, as a whole or not at all.

    model           any module; layers that are not quantized are written as they are, tied weights once
    tokenizer       whatever has `save_pretrained`, written beside the model
    max_shard_size  bytes, or text such as "5GB"; a bigger model becomes several files and an index
    format          "compressed-tensors", which holds every layer; "gptq", "gptq_v2" (which GPTQModel wants for
                    asymmetric weights) or "awq" where these can hold the integers; "modelopt" for nvfp4 that ModelOpt
                    or torchao made, whose scales no other format holds; "bitsandbytes" for nf4 and fp4; or "gguf":
                    one file for llama.cpp, `folder` itself if it ends in .gguf, in Q4_0, Q4_1 and Q8_0, with the
                    tokenizer in it

    One tensor at a time is in memory beside the model. Raises CheckpointError, leaving what was there untouched, if
    the model holds weights without numbers, the format cannot hold its layers (each is listed with the reason) or the
    files cannot be written.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"save takes an nn.Module, got {type(model).__name__}; torch.export.save writes exported "
                        f"programs")
    if format == "gguf":
        from qpass.formats.gguf_save import save_gguf

        return save_gguf(model, folder, tokenizer=tokenizer)
    plan = model.__dict__.get("_qpass_plan")
    writer, layers = _writer(model, format)
    if writer is not None:
        quantization: dict[str, Any] | None = writer.config(model, layers)
    else:
        said = (plan.recipe.to_dict(), plan.asked) if plan is not None else ()
        quantization = write_config(model, *said)
    shards = split_shards(list(_entries(model, writer, layers)), _bytes(max_shard_size))
    target = Path(folder).expanduser()
    with publish_folder(target, lambda name: _WEIGHT_FILE.fullmatch(name) is not None) as staging:
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _write_shards(staging, shards)
        save_config(model, staging, quantization)
    return target


def _writer(model: nn.Module, format: str) -> tuple[LayerWriter | None, dict[str, Writable]]:
    """The writer of a format other than compressed-tensors, and the layers that it writes."""
    if format == METHOD:
        return None, {}
    known = writers()
    if format not in known:
        raise CheckpointError(f"no format is written under the name {format!r}; there are "
                              f"{', '.join([METHOD, *known, 'gguf'])}")
    return known[format], writable_layers(model, known[format])


def _entries(model: nn.Module, writer: LayerWriter | None, layers: dict[str, Writable]) -> Iterator[Entry]:
    """Every tensor of the state dict once, under the first of its names."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, TiedTable):
            yield Entry(name=path, dtype=module.dtype, shape=tuple(module.shape), make=module.dequantize)
            continue
        if writer is not None and path in layers:
            if id(module._buffers) not in seen:
                seen.add(id(module._buffers))
                written = _Written(writer, layers[path])
                for name, (dtype, shape) in writer.describe(layers[path]).items():
                    yield Entry(name=prefix + name, dtype=dtype, shape=shape, make=partial(written.take, name))
        elif writer is not None and isinstance(module, QuantExperts):
            for name in (name for name in layers if name.startswith(prefix)):
                written = _Written(writer, layers[name])
                for leaf, (dtype, shape) in writer.describe(layers[name]).items():
                    yield Entry(name=f"{name}.{leaf}", dtype=dtype, shape=shape, make=partial(written.take, leaf))
        elif isinstance(module, PackedLayer):
            if id(module._buffers) in seen:  # tied: another layer reads the very same packed tensors
                described = {}
            else:
                described = module.on_disk
                seen.add(id(module._buffers))
            for name, (dtype, shape) in described.items():
                yield Entry(name=prefix + name, dtype=dtype, shape=shape, make=_maker(module, name))
        for name, tensor in _own_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.is_meta:
                raise CheckpointError(f"{prefix}{name} is on the meta device and holds no numbers; load weights "
                                      f"before save")
            yield Entry(name=prefix + name, dtype=tensor.dtype, shape=tuple(tensor.shape),
                        make=lambda tensor=tensor: tensor)  # type: ignore[misc]


class _Written:
    """A layer's tensors in a writer's format, packed when the first is asked for and each given away once."""

    def __init__(self, writer: LayerWriter, layer: Writable) -> None:
        self._writer, self._layer = writer, layer
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors = self._writer.tensors(self._layer)
        return self._tensors.pop(name)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _maker(layer: PackedLayer, name: str) -> Any:
    def make() -> Tensor:
        if layer.nbytes >= TRIM_AFTER // 4:
            give_back_freed_memory()
        return layer.tensor_on_disk(name)

    return make


def _write_shards(staging: Path, shards: list[list[Entry]]) -> None:
    if len(shards) == 1:
        write_file(staging / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(staging / name, shard)
        weight_map.update({entry.name: name for entry in shard})
    total = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (staging / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?B)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else size
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"max_shard_size must be a number of bytes or text such as '5GB', got {size!r}")
    return found
