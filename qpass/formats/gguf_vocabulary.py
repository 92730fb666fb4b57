"""GGUF vocabulary: a fast tokenizer with a byte-level BPE in; the `tokenizer.*` metadata that llama.cpp wants, out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from qpass.errors import CheckpointError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """The metadata of a Transformers tokenizer, its tokens padded to `size`, the rows of the model's embedding.

    Raises CheckpointError for what is not a byte-level BPE, or has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = json.loads(backend.to_str()) if backend is not None else {}
    model = said.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(said):
        raise CheckpointError("only byte-level BPE tokenizers are written to GGUF; save the model without a "
                              "tokenizer, or convert it with the script that GGUF comes with")
    tokens: list[str | None] = [None] * size
    types = [_UNUSED] * size
    added = {item["id"]: item for item in said.get("added_tokens", ())}
    for token, number in {**model["vocab"], **{item["content"]: item["id"] for item in added.values()}}.items():
        if number >= size:
            raise CheckpointError(f"the tokenizer has token {number} ({token!r}), and the model has {size} rows")
        tokens[number] = token
        extra = added.get(number)
        types[number] = _NORMAL if extra is None else _CONTROL if extra.get("special") else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": _table()["model"],
        "tokenizer.ggml.pre": splitting(said.get("pre_tokenizer") or {}),
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}
    for name in ("bos", "eos", "pad", "unk"):
        if isinstance(number := getattr(tokenizer, f"{name}_token_id", None), int):
            found[f"tokenizer.ggml.{'unknown' if name == 'unk' else 'padding' if name == 'pad' else name}_token_id"] = (
                number)
    found["tokenizer.ggml.add_bos_token"] = bool(getattr(tokenizer, "add_bos_token", False))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = template
    return found


def splitting(pre_tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way a text is split before merging, by the regular expressions; `default` if unknown."""
    text = json.dumps(pre_tokenizer, sort_keys=True)
    rows = _table()["splitting"]
    return next((str(row["name"]) for row in rows if all(part in text for part in row["parts"])), "default")


def _table() -> Any:
    return json.loads((files("qpass") / "data" / "gguf_vocabulary.json").read_text(encoding="utf-8"))
