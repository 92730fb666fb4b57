"""Evaluate: a model and a text in, perplexity out, and with a reference model the distance between the two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import EvaluationError
from qpass.measure.token_windows import Window, token_streams, windows_of

_ROWS_AT_ONCE_ELEMENTS = 1 << 22  # float32 work space of 16 MB a tensor, whatever the vocabulary


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one text says of a model; all means are over the scored tokens, in nats.

    tokens, windows, window, stride  what was read: each window gives the model up to `window` tokens
    loss, perplexity   mean negative log-likelihood of the next token, and its exponential
    reference_loss, reference_perplexity  the same of the reference on the same windows
    loss_increase      loss - reference_loss, with its standard error
    kl                 mean of KL(reference || model) over the vocabulary, with its standard error
    top1_agreement     how often both find the same token the likeliest

    Standard errors are paired and by window (tokens of one window are not independent); None if there is one window.
    Everything after `perplexity` is None without a reference.
    """

    tokens: int
    windows: int
    window: int
    stride: int
    loss: float
    perplexity: float
    reference_loss: float | None = None
    reference_perplexity: float | None = None
    loss_increase: float | None = None
    loss_increase_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None

    def __str__(self) -> str:
        lines = [("tokens", f"{self.tokens:,} in {self.windows:,} windows of {self.window:,} (stride {self.stride:,})"),
                 ("perplexity", f"{self.perplexity:.3f}")]
        if self.kl is not None and self.loss_increase is not None and self.top1_agreement is not None:
            lines += [("  of the reference", f"{self.reference_perplexity:.3f}"),
                      ("loss increase",
                       f"{self.loss_increase:+.4f}{_plus_minus(self.loss_increase_stderr)} nats a token"),
                      ("KL(reference || model)", f"{self.kl:.4f}{_plus_minus(self.kl_stderr)} nats a token"),
                      ("same top-1 token", f"{self.top1_agreement:.1%}")]
        return "\n".join(f"{label:<24}{value}" for label, value in lines)


def evaluate(model: Any, text_or_ids: Any, reference: Any = None, *, tokenizer: Any = None, window: int = 512,
             stride: int | None = None, tokens: int | None = None, progress: bool = False) -> Evaluation:
    """Perplexity of `model` on a text; with `reference` also KL, its standard error, and top-1 agreement.

    model, reference  causal language models, compiled or not: `input_ids` [1, T] in, logits [1, T, V] out
    text_or_ids  a text, the path of a text file, or token ids: a list, a tensor [T], or [B, T] for B texts
    tokenizer    a tokenizer or the path of one; by default that of the folder the model was loaded from
    window       how many tokens the model sees at once
    stride       how many new tokens each further window scores: `window` - `stride` tokens of each are context that
                 was scored before. By default `window`, which is the quickest and starts each window without context
    tokens       score at least this many, in whole windows, from the start; by default all of the text

    Each window predicts the token after each of its own, so every token but a text's first is scored, once.
    Log-softmax is in float32. Both models see the same windows and stay as they are.
    Raises EvaluationError for a text that is too short, a tokenizer that cannot be found, ids outside the vocabulary,
    and models of different vocabularies.
    """
    stride = window if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise EvaluationError(f"window must be positive and stride 1 to window; got window={window}, stride={stride}")
    streams = token_streams(text_or_ids, model, tokenizer)
    for one in [model] if reference is None else [model, reference]:
        check_ids(one, streams)
    todo = windows_of(streams, window, stride, tokens)
    table = torch.zeros(len(todo), 5, dtype=torch.float64)
    with _inference(model, reference), torch.no_grad():
        for row, piece in zip(table, _shown(todo, progress), strict=True):
            row.copy_(_score(model, reference, piece))
    return _summary(table, window, stride, reference is not None)


def check_ids(model: Any, streams: list[Tensor]) -> None:
    """Raise EvaluationError if an id has no row in the model's embedding."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        return
    low, high = min(int(s.min()) for s in streams), max(int(s.max()) for s in streams)
    if low < 0 or high >= size:
        raise EvaluationError(f"token ids run from {low} to {high}, but {type(model).__name__} has a vocabulary of "
                              f"{size}; is this the tokenizer of another model?")


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[1, T] ids -> logits [T, V], whatever the model calls its output."""
    held = getattr(model, "_orig_mod", model)
    # A cache that nobody will read costs memory; models that know the argument are told not to keep one.
    known = {"use_cache": False} if hasattr(getattr(held, "config", None), "use_cache") else {}
    output = model(input_ids=ids, **known) if hasattr(held, "config") else model(ids)
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"{type(held).__name__} should give logits [1, {ids.shape[1]}, vocabulary] for ids "
                              f"{tuple(ids.shape)}, but gave {got}; evaluate takes causal language models")
    return logits[0]


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter or buffer is."""
    first = next((t for t in (*model.parameters(), *model.buffers())), None)
    if first is not None and first.is_meta:
        raise EvaluationError(f"{type(model).__name__} is on the meta device and holds no numbers; load its weights")
    return torch.device("cpu") if first is None else first.device


def _score(model: Any, reference: Any, piece: Window) -> Tensor:
    """Sums over the scored tokens of one window: count, loss, reference loss, KL, agreements."""
    new = slice(piece.skip, None)
    logits = logits_of(model, piece.ids[None].to(device_of(model)))[new]
    wanted = None if reference is None else logits_of(reference, piece.ids[None].to(device_of(reference)))[new]
    if wanted is not None and wanted.shape != logits.shape:
        raise EvaluationError(f"the model has a vocabulary of {logits.shape[-1]} and the reference one of "
                              f"{wanted.shape[-1]}; they must be the same to be compared")
    targets = piece.targets[new]
    sums = torch.zeros(5, dtype=torch.float64)
    step = max(1, _ROWS_AT_ONCE_ELEMENTS // logits.shape[-1])
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        ours = logits[rows].float().log_softmax(-1)
        at = targets[rows, None].to(ours.device)
        sums[0] += len(at)
        sums[1] -= ours.gather(-1, at).double().sum().cpu()
        if wanted is not None:
            theirs = wanted[rows].to(ours.device).float().log_softmax(-1)
            sums[2] -= theirs.gather(-1, at).double().sum().cpu()
            # xlogy's rule, 0 * -inf = 0: a token that the reference rules out costs nothing.
            sums[3] += torch.where(theirs > -torch.inf, theirs.exp() * (theirs - ours), 0.0).double().sum().cpu()
            sums[4] += (ours.argmax(-1) == theirs.argmax(-1)).sum().cpu()
    return sums


def _summary(table: Tensor, window: int, stride: int, paired: bool) -> Evaluation:
    count = table[:, 0]
    total = count.sum().item()
    loss, reference_loss, kl, agreed = (table[:, 1:].sum(0) / total).tolist()
    known: dict[str, Any] = {}
    if paired:
        known = {
            "reference_loss": reference_loss, "reference_perplexity": _exp(reference_loss),
            "loss_increase": loss - reference_loss,
            "loss_increase_stderr": _stderr(table[:, 1] - table[:, 2], count),
            "kl": kl, "kl_stderr": _stderr(table[:, 3], count), "top1_agreement": agreed,
        }
    return Evaluation(tokens=int(total), windows=len(table), window=window, stride=stride, loss=loss,
                      perplexity=_exp(loss), **known)


def _stderr(sums: Tensor, counts: Tensor) -> float | None:
    """Of sum(sums) / sum(counts) as a ratio estimator, windows being the independent draws."""
    n = len(sums)
    if n < 2:
        return None
    residual = sums - counts * (sums.sum() / counts.sum())
    return float((residual.square().sum() * n / (n - 1)).sqrt() / counts.sum())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _plus_minus(error: float | None) -> str:
    return " (one window: no standard error)" if error is None else f" ± {error:.4f}"


def _shown(todo: list[Window], progress: bool) -> Iterator[Window]:
    from tqdm import tqdm

    yield from tqdm(todo, desc="evaluating", unit="window", disable=not progress)


class _inference:
    """Every module in eval mode inside the block, and as it was after it."""

    def __init__(self, *models: Any) -> None:
        self.modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules() if m.training]

    def __enter__(self) -> None:
        for module in self.modules:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            module.training = True
