"""Samples: calibration data as the user has it (model inputs, texts, files) in, arguments of forwards out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import CalibrationError


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Arguments of one forward. `mask` [B, T] is True for tokens that count, None if all do."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any]
    mask: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What identifies the sample."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


def read_samples(data: Any, model: nn.Module, *, tokenizer: Any = None, num_samples: int = 128,
                 max_seq_length: int = 512) -> list[Sample]:
    """At most `num_samples` samples; token sequences are cut to `max_seq_length`.

    data  the path of a text file or a list of such paths (windows of `max_seq_length` tokens, spread evenly over the
          files), a list of texts (one sample a text), or any iterable of model inputs: a tensor, a tuple of positional
          or a mapping of keyword arguments; an `attention_mask` [B, T] among them says which tokens count

    Texts need `tokenizer`, or a model that says where its own is. Raises CalibrationError for data that holds nothing
    or something else.
    """
    for name, value in (("num_samples", num_samples), ("max_seq_length", max_seq_length)):
        if type(value) is not int or value < 1:
            raise CalibrationError(f"{name} must be a positive integer, got {value!r}")
    if isinstance(data, (str, Path)):
        data = [Path(data)]
    if isinstance(data, (Tensor, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError("calibration takes an iterable of model inputs, a list of texts, or the path of a text "
                               f"file; got {type(data).__name__}. Put a single input into a list")
    found = list(islice(data, num_samples)) if not isinstance(data, Sequence) else list(data)
    if not found:
        raise CalibrationError("the calibration data holds no sample; a generator may have been used up before")
    if all(isinstance(item, (str, Path)) for item in found):
        return _text_samples(found, model, tokenizer, num_samples, max_seq_length)
    return [_input_sample(item, model, max_seq_length) for item in found[:num_samples]]


def _text_samples(texts: Sequence[str | Path], model: nn.Module, tokenizer: Any, count: int,
                  length: int) -> list[Sample]:
    from qpass.measure.token_windows import tokenizer_of

    encode = tokenizer_of(model, tokenizer)
    files = [isinstance(text, Path) or _is_file(text) for text in texts]
    if any(files) and not all(files):
        wrong = texts[files.index(False)]
        raise CalibrationError(f"some of the calibration texts are files and {str(wrong)[:80]!r} is none; give only "
                               "files or only texts")
    if all(files):
        windows = []
        for number, path in enumerate(texts):
            share = count // len(texts) + (number < count % len(texts))
            windows += _windows(encode(_read(Path(path)), verbose=False)["input_ids"], share, length, path)
    else:
        windows = [torch.as_tensor(encode(text, verbose=False)["input_ids"])[:length] for text in texts[:count]]
        if empty := [text for text, ids in zip(texts, windows, strict=False) if ids.numel() == 0]:
            raise CalibrationError(f"the calibration text {empty[0]!r} has no tokens")
    return [_input_sample(ids[None], model, length) for ids in windows]


def _windows(ids: Sequence[int], count: int, length: int, path: object) -> list[Tensor]:
    """`count` windows without overlap if the text has as many, evenly spread; fewer if it does not."""
    whole = torch.as_tensor(ids)
    if whole.numel() == 0:
        raise CalibrationError(f"{path} has no tokens to calibrate on")
    have = max(1, len(whole) // length)
    picked = [have * number // min(count, have) for number in range(min(count, have))]
    return [whole[start * length:(start + 1) * length] for start in picked]


def _is_file(text: str) -> bool:
    try:
        return len(text) < 4096 and "\n" not in text and Path(text).is_file()
    except OSError:
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read the calibration text {path}: {error}") from error


def _input_sample(item: Any, model: nn.Module, length: int) -> Sample:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(item, Mapping) or hasattr(item, "input_ids"):
        args, kwargs = (), dict(item)
    elif isinstance(item, Tensor):
        args, kwargs = (item,), {}
    elif isinstance(item, (tuple, list)) and any(isinstance(part, Tensor) for part in item):
        args, kwargs = tuple(item), {}
    else:
        raise CalibrationError("a calibration sample is a tensor, a tuple of positional or a mapping of keyword "
                               f"arguments; got {type(item).__name__}")
    names = list(inspect.signature(model.forward).parameters)
    main = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(main, Tensor) and not main.is_floating_point() and main.ndim == 2 and main.shape[1] > length:
        size = main.shape[1]
        args = tuple(_cut(value, size, length) for value in args)
        kwargs = {name: _cut(value, size, length) for name, value in kwargs.items()}
    if "use_cache" in names and "use_cache" not in kwargs:
        kwargs["use_cache"] = False
    mask = kwargs.get("attention_mask")
    counted = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if counted is not None and not counted.any():
        raise CalibrationError("a calibration sample masks every one of its tokens; leave it out")
    return Sample(args=args, kwargs=kwargs, mask=counted)


def _cut(value: Any, size: int, length: int) -> Any:
    """The first `length` of what has one entry a token."""
    whole = isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == size
    return value[:, :length] if whole else value
