"""Token windows: a text, a file or token ids in, windows of ids with the tokens that follow them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.errors import EvaluationError


@dataclass(frozen=True, kw_only=True)
class Window:
    """`targets[i]` is the token after `ids[i]`; the first `skip` are context that an earlier window scored."""

    ids: Tensor
    targets: Tensor
    skip: int


def windows_of(streams: list[Tensor], window: int, stride: int, tokens: int | None) -> list[Window]:
    """Cut streams of ids [T] into windows of at most `window`, each scoring `stride` new tokens, the first all.

    With `tokens`, stops with the window that brings the scored tokens to that number; raises EvaluationError if
    there are not as many.
    """
    found: list[Window] = []
    scored = 0
    for stream in streams:
        start = end = 0  # targets up to number `end` are scored
        while end < len(stream) - 1:
            stop = min(start + window, len(stream) - 1)
            found.append(Window(ids=stream[start:stop], targets=stream[start + 1:stop + 1], skip=end - start))
            scored += stop - end
            end = stop
            if tokens is not None and scored >= tokens:
                return found
            start += stride
    if tokens is not None:
        raise EvaluationError(f"the text has {scored:,} tokens to score and {tokens:,} were asked for; give a longer "
                              "text or a smaller number")
    return found


def token_streams(source: Any, model: Any, tokenizer: Any) -> list[Tensor]:
    """Texts as int64 ids [T] on the CPU, one for each row of ids given; raises EvaluationError if one is too short."""
    if isinstance(source, Mapping) or hasattr(source, "input_ids"):
        source = source["input_ids"]
    if isinstance(source, (str, Path)):
        text = _read(source)
        ids = torch.as_tensor(tokenizer_of(model, tokenizer)(text, verbose=False)["input_ids"])
    else:
        ids = torch.as_tensor(source).cpu()
    if ids.numel() == 0:
        raise EvaluationError("the text has 0 tokens; at least 2 are needed, one to read and one to predict")
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise EvaluationError(f"token ids must be integers [T] or [B, T], got {ids.dtype} {tuple(ids.shape)}; "
                              "a text is given as a string or the path of a file")
    streams = list(ids.long().reshape(-1, ids.shape[-1]))
    if ids.shape[-1] < 2:
        raise EvaluationError(f"the text has {ids.shape[-1]} tokens; at least 2 are needed, one to read and one to "
                              "predict")
    return streams


def _read(source: str | Path) -> str:
    """The text itself, or what the file of that name holds. A line of prose is no file name, and is taken as text."""
    looks = isinstance(source, Path) or (0 < len(source) < 4096 and "\n" not in source)
    try:
        if looks and Path(source).is_file():
            return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        if isinstance(source, Path) or error.errno is None:
            raise EvaluationError(f"cannot read {source}: {error}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{source} is not a text in UTF-8: {error}") from error
    text = str(source)
    named = looks and not any(c.isspace() for c in text) and ("/" in text or text.endswith((".txt", ".md", ".text")))
    if isinstance(source, Path) or named:
        raise EvaluationError(f"there is no file {text}; give the path of a text file, or the text itself")
    return text


def tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """The tokenizer given, the one at the path given, or that of the folder the model came from."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    held = getattr(model, "_orig_mod", model)
    where = str(tokenizer or getattr(held, "name_or_path", "") or "")
    if not where:
        raise EvaluationError(f"{type(held).__name__} does not say where it was loaded from, so its tokenizer is "
                              "unknown; pass tokenizer=..., or token ids in place of the text")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:
        raise EvaluationError(f"no tokenizer could be loaded from {where!r} ({type(error).__name__}: "
                              f"{str(error).splitlines()[0] if str(error) else 'no message'}); pass tokenizer=..., or "
                              "token ids in place of the text") from error

