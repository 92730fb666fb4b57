"""GGUF config: the metadata of a file in; the Transformers config, the empty model and the tokenizer of it out.

Transformers' own tables do the translation. What they are shown is a file made here from the checked header, without
vocabulary and numbers, so that a big file costs milliseconds and a hostile one meets no other parser.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpass.errors import CheckpointError, QPassError
from qpass.formats.gguf_file import MAGIC, GgufFile, Strings
from qpass.formats.gguf_rope import set_rope

if TYPE_CHECKING:
    from torch import nn

_LARGEST = 1 << 24  # of any number in the metadata but those of positions; far above every model there is
_POSITIONS = ("context_length", "original_context_length")
_UINT32, _FLOAT32 = 4, 0

# Keys that Transformers' tables leave out, so that the config would keep its default -> the config's names.
_LEFT_OUT = {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"}
EXPERT_SIZES = {"expert_feed_forward_length": "moe_intermediate_size",
                "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}


def architecture_of(file: GgufFile) -> str:
    """`general.architecture`. Raises CheckpointError if there is none."""
    found = file.metadata.get("general.architecture")
    if not isinstance(found, str) or not found:
        raise CheckpointError(f"{file.path} has no general.architecture, so nothing says what model it holds")
    return found


def read_config(file: GgufFile) -> Any:
    """The Transformers config. Raises CheckpointError for an architecture that Transformers does not translate."""
    try:
        import transformers
    except ImportError as error:
        raise QPassError("GGUF files need Transformers and gguf: pip install 'qpass-torch[hf]' gguf") from error
    architecture = architecture_of(file)
    _check_numbers(file, architecture)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "header.gguf").write_bytes(_header_only(file, architecture))
        try:
            config = transformers.AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
        except ImportError as error:
            raise QPassError(f"GGUF files need the gguf package: {error}") from error
        except Exception as error:
            raise CheckpointError(f"Transformers {transformers.__version__} cannot make a config of {file.path} "
                                  f"(architecture {architecture!r}): {error}") from error
    config.__dict__.pop("quantization_config", None)
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    known: Any = GGUF_CONFIG_MAPPING.get(architecture, {})  # where a key may mean another size of the config
    for key, name in (*EXPERT_SIZES.items(), *_LEFT_OUT.items()):
        size = file.metadata.get(f"{architecture}.{key}")
        if isinstance(size, int) and hasattr(config, name) and key not in known:
            setattr(config, name, size)
    set_rope(config, file, architecture)
    return config


def empty_model(file: GgufFile, config: Any) -> nn.Module:
    """The model without its weights."""
    from qpass.hf.model_config import empty_causal_model

    return empty_causal_model(config, file.path)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file holds, by Transformers' converters. Raises CheckpointError if it has none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError, OSError, AttributeError, IndexError) as error:
        raise CheckpointError(f"Transformers cannot make a tokenizer of {path}: {error}") from error


def _check_numbers(file: GgufFile, architecture: str) -> None:
    """A config may ask for no more than the file can hold: a model is built of these numbers."""
    for key, value in file.metadata.items():
        if not key.startswith(architecture + "."):
            continue
        name = key.removeprefix(architecture + ".")
        for number in value if isinstance(value, list) else [value]:
            most = len(file.tensors) if name == "block_count" else _LARGEST
            if isinstance(number, int) and not name.endswith(_POSITIONS) and not -1 <= number <= most:
                raise CheckpointError(f"{file.path}: {key} is {number}, more than the file can hold")


def _header_only(file: GgufFile, architecture: str) -> bytes:
    """A GGUF file with the same metadata but no vocabulary, and the same tensors with one number each."""
    kept = [key for key, value in file.metadata.items()  # how positions are stretched is read in gguf_rope.py
            if not isinstance(value, Strings) and ".rope.scaling." not in key]
    raw = file.raw_metadata(kept)
    extra = b""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if f"{architecture}.vocab_size" not in file.metadata and isinstance(tokens, Strings):
        extra = _string(f"{architecture}.vocab_size") + struct.pack("<II", _UINT32, len(tokens))
    table = b"".join(_string(name) + struct.pack("<IQIQ", 1, 1, _FLOAT32, 0) for name in file.tensors)
    head = MAGIC + struct.pack("<IQQ", 3, len(file.tensors), len(kept) + bool(extra)) + raw + extra + table
    alignment = file.metadata.get("general.alignment", 32)
    return head + bytes(-len(head) % alignment) + bytes(alignment)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
