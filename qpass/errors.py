"""Errors: every one says what went wrong, where (the layer's name), why, and what to do next."""

from __future__ import annotations


class QPassError(Exception):
    """Any error that qpass raises on purpose."""


class RecipeError(QPassError, ValueError):
    """A recipe, rule or scheme that cannot mean anything."""


class UnmatchedRule(RecipeError):
    """A rule or ignore entry that matched no site of the model."""


class RuleConflict(RecipeError):
    """Two rules of one tier match one site and want different things."""


class NothingQuantized(RecipeError):
    """The recipe leaves every layer in float."""


class LayerRefused(QPassError):
    """A layer cannot be quantized as asked, and the recipe's policy makes that an error."""


class AlreadyQuantized(QPassError):
    """The model holds quantized layers already."""


class AlreadyCompiled(QPassError):
    """The model is the result of torch.compile; quantize before compiling."""


class WeightError(QPassError, ValueError):
    """A weight that cannot be quantized: not floating point, meta, empty, NaN or Inf."""


class CaptureError(QPassError):
    """No graph of the model could be had."""


class NoKernel(QPassError):
    """No kernel runs this layer on this machine; the message lists each kernel's refusal."""


class DuplicateRegistration(QPassError):
    """A scheme, kernel, layout or pass of this name is already registered."""


class LoweringError(QPassError):
    """A pass left the graph in a state that cannot be compiled, or differs from the reference."""


class PackedForInference(QPassError):
    """An operation that packed weights do not support, such as training or a dtype cast of integers."""


class CheckpointError(QPassError):
    """A checkpoint that is damaged, incomplete, or disagrees with its own config."""


class CalibrationError(QPassError, ValueError):
    """Calibration data that cannot be used: nothing in it, layers that it never reaches, activations that are NaN."""


class EvaluationError(QPassError, ValueError):
    """A text, ids or models that cannot be evaluated or compared: too short, no tokenizer, different vocabularies."""
