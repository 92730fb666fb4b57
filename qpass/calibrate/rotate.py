"""Rotate: a float model in; the same function out, with the channels of its residual stream mixed by its parameters.

As QuaRot (Ashkboos et al., 2024) and SpinQuant do, but from the graph: each stream that `find_streams` shows is rotated
by changing what writes and reads it. A norm's weight and bias move into the products that follow it; where one of those
is a head tied to the table of embeddings, the two are untied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from qpass.calibrate.block_work import first_tensor
from qpass.calibrate.find_streams import find_streams
from qpass.calibrate.rotation_math import Orthogonal, hadamard_like
from qpass.calibrate.samples import Sample
from qpass.calibrate.stream import Norm, Reader, Stream
from qpass.capture.as_found import in_eval_mode
from qpass.capture.capture_model import Capture

_SMALLEST = 1e-3  # of a norm's weight, beside its largest, by which its bias may be divided
_TOLERANCE = {4: 1e-3, 2: 0.1}  # of the output's norm, by bytes of a number: a wrong rotation is off by about 1


def rotate(model: nn.Module, capture: Capture, sample: Sample | None, seed: int,
           quantized: Collection[str]) -> list[str]:
    """Rotate every stream of `model` that can be, in place; returns notes for the report.

    The model runs on `sample` before and after, and has its parameters back if the outputs differ by more than
    rounding, as it has after an exception. `quantized`: names of the sites that the recipe quantizes, which a tied head
    must not be among. Memory, while it runs: a second copy of the parameters that change.
    """
    found = find_streams(capture)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    why = {stream: stream.pinned or _refusal(model, parameters, stream, quantized) for stream in found}
    notes = [f"rotation: the {stream.width} channels that {stream.writers[0].parameter} writes first stay as they are: "
             f"{reason}" for stream, reason in why.items() if reason and any(r.norm.weight for r in stream.readers)]
    streams = [stream for stream, reason in why.items() if not reason]
    if not streams:
        return notes or ["rotation: no products of this model read a stream that others write; nothing is rotated"]
    before = {name: parameter.data for name, parameter in parameters.items()}
    with in_eval_mode(model), torch.no_grad():
        wanted = None if sample is None else run_on(model, sample)
        heads = {head: _untie(model, parameters, head) for stream in streams for head in _tied_heads(stream)}
        try:
            _change(parameters, heads, streams, seed)
            got = None if sample is None else run_on(model, sample)
        except BaseException:
            _undo(model, parameters, before, heads)
            raise
    moved = 0.0 if got is None or wanted is None else float((got - wanted).norm() / wanted.norm())
    if not moved <= allowed(next(iter(before.values())).dtype):
        _undo(model, parameters, before, heads)
        return [*notes, f"rotation: the model's output moved by {moved:.1%}, more than rounding does; taken back"]
    if heads:
        _tell_untied(model)
        notes += [f"rotation: {head.owner} has a weight of its own now and is no longer tied to {head.weight}, which "
                  "holds no norm's weight" for head in heads]
    writers, readers = (sum(len(group) for group in groups) for groups in (
        [s.writers for s in streams], [s.readers for s in streams]))
    widths = ", ".join(str(stream.width) for stream in streams)
    return [*notes, f"rotation: {widths} channels mixed, which {writers} parameters write and {readers} products read; "
                    f"the model's output moved by {moved:.1e} of its size"]


def _refusal(model: nn.Module, parameters: Mapping[str, nn.Parameter], stream: Stream,
             quantized: Collection[str]) -> str:
    """Why the parameters of a stream cannot be changed as a rotation asks; "" if they can."""
    for head in _tied_heads(stream):
        if head.weight in quantized:
            return (f"{head.weight} is also a head, which the recipe quantizes and a rotation would untie; add the "
                    "head to ignore")
        if not any(p is parameters[head.weight] for p in model.get_submodule(head.owner).parameters(recurse=False)):
            return f"{head.owner or 'the model'} multiplies by {head.weight}, and has no parameter of its own to untie"
    for norm, readers in _by_norm(stream).items():
        if norm.weight is not None and norm.bias is not None and not _in_biases(readers):
            weight = parameters[norm.weight.parameter].data.float().abs()
            if float(weight.min()) < _SMALLEST * float(weight.max()):
                return (f"{norm.weight.parameter} is nearly 0 in places, and not everything that reads the norm has a "
                        f"bias to take up {norm.bias.parameter}")
    return ""


def _by_norm(stream: Stream) -> dict[Norm, list[Reader]]:
    found: dict[Norm, list[Reader]] = {}
    for reader in dict.fromkeys(stream.readers):
        found.setdefault(reader.norm, []).append(reader)
    return found


def _in_biases(readers: Sequence[Reader]) -> bool:
    """Whether what a norm adds can move into the biases of all that read it; otherwise the norm adds it, rotated."""
    return all(reader.bias is not None for reader in readers)


def _tied_heads(stream: Stream) -> list[Reader]:
    """Readers whose weight is also a table that writes the stream."""
    tables = {writer.parameter for writer in stream.writers if writer.table}
    return [reader for reader in dict.fromkeys(stream.readers) if reader.weight in tables]


def _untie(model: nn.Module, parameters: Mapping[str, nn.Parameter], head: Reader) -> nn.Parameter:
    owner, table = model.get_submodule(head.owner), parameters[head.weight]
    name = next(name for name, parameter in owner.named_parameters(recurse=False) if parameter is table)
    own = nn.Parameter(table.data, requires_grad=table.requires_grad)
    setattr(owner, name, own)
    return own


def _change(parameters: Mapping[str, nn.Parameter], heads: Mapping[Reader, nn.Parameter], streams: Sequence[Stream],
            seed: int) -> None:
    """Fold the norms and rotate. What reads a stream comes first: its bias takes up a norm's, and may be a writer."""
    turns = [hadamard_like(stream.width, seed + number, keeps_mean=stream.keeps_mean)
             for number, stream in enumerate(streams)]
    for stream, turn in zip(streams, turns, strict=True):
        for norm, readers in _by_norm(stream).items():
            for reader in readers:
                _change_reader(parameters, heads.get(reader, parameters[reader.weight]), reader, turn,
                               _in_biases(readers))
            _empty_norm(parameters, norm, None if _in_biases(readers) else turn)
    for stream, turn in zip(streams, turns, strict=True):
        for writer in stream.writers:
            parameter = parameters[writer.parameter]
            parameter.data = _along(turn.turn(_along(parameter.data, writer.dim)), writer.dim).to(parameter.dtype)


def _change_reader(parameters: Mapping[str, nn.Parameter], weight: nn.Parameter, reader: Reader, turn: Orthogonal,
                   in_biases: bool) -> None:
    columns, norm = _along(weight.data, reader.dim).float(), reader.norm
    if norm.bias is not None and reader.bias is not None and in_biases:
        bias = parameters[reader.bias]
        bias.data = (bias.data.float() + columns @ parameters[norm.bias.parameter].data.float()).to(bias.dtype)
    if norm.weight is not None:
        columns = columns * (parameters[norm.weight.parameter].data.float() + norm.weight.offset)
    weight.data = _along(turn.turn(columns), reader.dim).to(weight.dtype)


def _empty_norm(parameters: Mapping[str, nn.Parameter], norm: Norm, turn: Orthogonal | None) -> None:
    """Make the norm multiply by 1, and add nothing or, with `turn`, what it added as it stands after the rotation."""
    weight = None if norm.weight is None else parameters[norm.weight.parameter]
    if norm.bias is not None:
        bias = parameters[norm.bias.parameter]
        added = bias.data.float() if weight is None else bias.data.float() / weight.data.float()
        bias.data = torch.zeros_like(bias.data) if turn is None else turn.turn(added).to(bias.dtype)
    if weight is not None and norm.weight is not None:
        weight.data = torch.full_like(weight.data, 1.0 - norm.weight.offset)


def _along(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with `dim`, the last or the last but one, at its end; the same call puts it back."""
    return tensor if dim == -1 else tensor.transpose(-1, -2).contiguous()


def allowed(dtype: torch.dtype) -> float:
    """How far, of its size, rounding alone may move the output of a model in `dtype`."""
    return _TOLERANCE.get(dtype.itemsize, 0.1)


def run_on(model: nn.Module, sample: Sample) -> Tensor:
    """The model's first output, float32."""
    return first_tensor(model(*sample.args, **sample.kwargs)).float()


def _undo(model: nn.Module, parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor],
          heads: Mapping[Reader, nn.Parameter]) -> None:
    for name, data in before.items():
        parameters[name].data = data
    for head, own in heads.items():
        owner = model.get_submodule(head.owner)
        name = next(name for name, parameter in owner.named_parameters(recurse=False) if parameter is own)
        setattr(owner, name, parameters[head.weight])


def _tell_untied(model: nn.Module) -> None:
    """Transformers ties again what the config says is tied."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    for one in (config, text):
        if one is not None and getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False
