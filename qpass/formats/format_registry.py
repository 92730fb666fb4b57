"""Format registry: the one table of checkpoint formats; a folder or file in, the format that reads it out.

A package of one's own adds a format with `register_format`, or names a module that does under the entry point group
`qpass.formats`, which is imported when a checkpoint is first looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpass.errors import CheckpointError, DuplicateRegistration
from qpass.formats.checkpoint import Checkpoint, Source, read_json
from qpass.formats.reader import Reader
from qpass.formats.safetensors_file import is_transformers_folder
from qpass.formats.safetensors_folder import SafetensorsFolder

if TYPE_CHECKING:
    from torch import nn

GROUP = "qpass.formats"
_BUILTIN = ("compressed_tensors_format", "gptq", "awq", "autoround", "bitsandbytes_format", "gguf_format",
            "modelopt", "quark_format", "torchao_format", "fp8_format", "mxfp4_experts_format", "hqq_format",
            "quanto_format", "deepspeedfp_format")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One checkpoint format.

    name         how it is called here and in `qpass convert --to`
    title        for tables
    methods      values of `quant_method` in config.json that mean this format
    reads, runs  for the table of formats: what of it loads, and what then computes
    reader       Checkpoint -> Reader; raises CheckpointError, saying what it is, for what it cannot read
    claims       (path, config.json or {}) -> whether this is such a checkpoint though no quant_method says so; looks
                 at names and at little files, and raises nothing
    source       (path, allow_pickle) -> the tensors, if they are not in safetensors files
    empty_model  Checkpoint -> the model without weights, if config.json does not describe it
    """

    name: str
    title: str
    methods: tuple[str, ...]
    reader: Callable[[Checkpoint], Reader]
    reads: str = ""
    runs: str = ""
    claims: Callable[[Path, Mapping[str, Any]], bool] | None = None
    source: Callable[[Path, bool], Source] | None = None
    empty_model: Callable[[Checkpoint], nn.Module] | None = None


_FORMATS: dict[str, Format] = {}
_loaded: list[str] = []


def register_format(made: Format) -> Format:
    """Add a format. Raises DuplicateRegistration if its name, or a quant_method of it, is taken."""
    for known in _FORMATS.values():
        if known.name == made.name:
            raise DuplicateRegistration(f"a format named {made.name!r} is registered already; choose another name")
        if taken := set(known.methods) & set(made.methods):
            raise DuplicateRegistration(f"format {known.name!r} reads quant_method {taken.pop()!r} already")
    _FORMATS[made.name] = made
    return made


def formats() -> dict[str, Format]:
    """Every registered format by name: the built-in ones, then those of installed packages."""
    if not _loaded:
        _loaded.append("builtin")
        for module in _BUILTIN:
            import_module(f"qpass.formats.{module}")
        for entry in entry_points(group=GROUP):
            loaded = entry.load()
            if isinstance(loaded, Format) and loaded.name not in _FORMATS:
                register_format(loaded)
    return dict(_FORMATS)


def open_checkpoint(where: str | os.PathLike[str], *, allow_pickle: bool = False) -> tuple[Format | None, Checkpoint]:
    """What stands at `where`, and the format that reads it; None for a float model. Reads configs and headers only.

    Raises CheckpointError if nothing is there, nothing says what it is, or no format reads it.
    """
    path = Path(where).expanduser()
    config = _config(path)
    raw = _quantization(config)
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {type(raw).__name__}, not its fields")
    chosen = _format_of(path, config, raw)
    several = sorted(path.glob("*.gguf")) if path.is_dir() and not is_transformers_folder(path) else []
    if chosen is None and several:
        raise CheckpointError(f"{path} holds {len(several)} GGUF files; name the one to load, such as {several[0]}")
    if chosen is None and path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json, so nothing says what model it holds")
    if chosen is None and not path.is_dir():
        raise CheckpointError(f"{path} is no folder with config.json and safetensors files, and no file of a known "
                              f"format ({', '.join(formats())})")
    opened = chosen.source if chosen is not None and chosen.source is not None else None
    source: Source = SafetensorsFolder(path) if opened is None else opened(path, allow_pickle)
    return chosen, Checkpoint(path=path, config=config, quantization=raw, source=source)


def format_of_folder(path: Path) -> Format | None:
    """The format of a checkpoint folder, from its config.json and the names of its files; None for floats."""
    config = _config(path)
    return _format_of(path, config, _quantization(config))


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is no folder: nothing is there (models are not downloaded)")
    file = path / "config.json"
    return read_json(file) if path.is_dir() and file.exists() else {}


def _quantization(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantization, where the tools put it: for a model of several parts, also in the part
    that reads text; in older files of compressed-tensors under another name, beside what they say of sparsity."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if found := part.get("quantization_config") or part.get("compression_config") or part.get("quantization"):
            nested = found.get("quantization_config") if isinstance(found, Mapping) else None
            return found if not isinstance(nested, Mapping) else {
                **nested, **({"sparsity_config": found["sparsity_config"]} if found.get("sparsity_config") else {})}
    return {}


def _format_of(path: Path, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> Format | None:
    known = formats()
    method = quantization.get("quant_method")
    if quantization and isinstance(method, str):
        for made in known.values():
            if method in made.methods:
                return made
    for made in known.values():
        if made.claims is not None and made.claims(path, config):
            return made
    if quantization:
        methods = sorted(m for made in known.values() for m in made.methods)
        what = f"in format {method!r}" if method is not None else (
            f"quantized and names no quant_method, only {', '.join(map(str, list(quantization)[:6]))} (as MLX does)")
        raise CheckpointError(f"{path / 'config.json'}: the checkpoint is {what}, and this version reads "
                              f"{', '.join(methods)}; load it with the tool that made it, quantize the float model, or "
                              "install a package that registers the format")
    return None


def formats_table() -> str:
    """The registered formats as a Markdown table: what is called so, what of it loads, and what computes then."""
    rows = [f"| {made.title} | `{made.name}` | {made.reads} | {made.runs} |" for made in formats().values()]
    return "\n".join(["| format | name | what loads | what runs |", "|---|---|---|---|", *rows])
