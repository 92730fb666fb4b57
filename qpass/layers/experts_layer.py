"""QuantExperts: takes the place of a module that computes experts, with the experts' weights packed.

It is called as the module was, and gives what `qpass::experts` does. Experts that a recipe treats differently stand in
blocks of their own; a block sees the others' experts as living elsewhere, and the blocks' results are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import qpass.kernels.dispatch  # noqa: F401  (gives the op below what it does, as gradient_experts does)
from qpass.experts_site import Argument, ExpertsSite
from qpass.experts_spec import ExpertsSpec
from qpass.find.experts_rows import gate_first, packed_part
from qpass.kernels.experts_choice import choose_experts, unpack_block
from qpass.kernels.gradient_experts import both_or_none
from qpass.kernels.layout import Packed
from qpass.kernels.reference.experts import part_names
from qpass.kernels.registry import ExpertsCall, kernel
from qpass.layers.experts_disk import Disk, describe, read_expert, write_expert
from qpass.layers.packed_layers import PackedLayer, moved
from qpass.weight import CanonicalWeight, dequantize_weight

Weight = CanonicalWeight | Tensor  # quantized, or float [N, K]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Experts of one scheme: which, in order, how they are computed, and the names of their packed tensors."""

    experts: tuple[int, ...]
    spec: ExpertsSpec
    text: str
    names: tuple[str, ...]

    def part(self, which: int) -> tuple[str, ...]:
        """The names of the first (0) or second (1) weight's tensors."""
        count = len(part_names(self.spec)[0])
        return self.names[count:] if which else self.names[:count]


class QuantExperts(PackedLayer):
    """y = the weighted sum of each token's experts, all weights packed; `origin` is the module it replaced.

    Invariant: buffers hold, for each block, its linear layouts' tensors with a leading dimension of experts, gate rows
    before up rows. Biases stay parameters, stored as the module stored them.
    """

    def __init__(self, site: ExpertsSite, origin: nn.Module, dtype: torch.dtype) -> None:
        """Empty; `put_block` gives it weights. `origin`'s parameters that are multiplied may be on the meta device."""
        super().__init__()
        self.site, self.origin, self.dtype = site, [origin], dtype  # in a list: not a child
        self.training = False
        self.blocks: list[Block] = []
        self.first_bias_rows: Tensor | None
        self.second_bias_rows: Tensor | None
        self._parameters.update({leaf: p for leaf, p in origin._parameters.items() if leaf not in site.parameters})
        self._buffers.update(origin._buffers)
        self._modules.update(origin._modules)
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(origin, hooks))
        # What else the module says of itself, for code that asks it (`experts.num_experts`, `experts.config`).
        self.__dict__.update({name: value for name, value in vars(origin).items()
                              if not name.startswith("_") and not hasattr(self, name)})
        self._refresh_biases()

    def put_block(self, spec: ExpertsSpec, experts: Sequence[int], first: Iterator[Weight | Packed],
                  second: Iterator[Weight | Packed]) -> None:
        """Add experts, given in order and taken one at a time, packed as `spec` says."""
        number, text = len(self.blocks), str(spec)
        names: list[str] = []
        for label, part, weights in zip(("first", "second"), spec.parts, (first, second), strict=True):
            for name, tensor in packed_part(part, len(experts), weights).items():
                names.append(f"packed_{number}_{label}_{name}")
                self.register_buffer(names[-1], tensor, persistent=False)
        self.blocks.append(Block(experts=tuple(experts), spec=spec, text=text, names=tuple(names)))
        self._spec_text = text
        if len(self.blocks) > 1 or len(experts) < self.site.experts:
            for at, block in enumerate(self.blocks):
                table = torch.full((self.site.experts + 1,), len(block.experts))
                table[list(block.experts)] = torch.arange(len(block.experts))
                self.register_buffer(f"local_{at}", table.to(self.device), persistent=False)

    @property
    def packed(self) -> list[Tensor]:
        return [self.get_buffer(name) for block in self.blocks for name in block.names]

    @property
    def device(self) -> torch.device:
        return self.packed[0].device

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = _take(self.site.x, args, kwargs)
        rows, index, weight = self.routing(*args, **kwargs)
        if len(self.blocks) == 1 and len(self.blocks[0].experts) == self.site.experts:
            return self._run(self.blocks[0], rows, index, weight).view(x.shape)
        safe = torch.where((index < 0) | (index > self.site.experts), self.site.experts, index)
        wide = rows.float()
        total = torch.zeros_like(wide)
        for at, block in enumerate(self.blocks):
            local = getattr(self, f"local_{at}")[safe]
            total = total + self._run(block, wide, local, weight)
        return total.to(x.dtype).view(x.shape)

    def routing(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H], index and weight [T, k] of a call, whatever the module's own way of routing."""
        site, experts = self.site, self.site.experts
        rows = _take(site.x, args, kwargs).reshape(-1, site.hidden)
        if site.form == "indexed":
            assert site.index is not None and site.weight is not None
            index, weight = _take(site.index, args, kwargs), _take(site.weight, args, kwargs)
            return rows, index.reshape(-1, index.shape[-1]), weight.reshape(-1, weight.shape[-1])
        numbers = torch.arange(experts, device=rows.device)
        if site.form == "scored":
            assert site.weight is not None
            weight = _take(site.weight, args, kwargs).reshape(-1, experts)
            return rows, torch.where(weight != 0, numbers, experts), weight
        index = numbers[:, None].expand(experts, rows.shape[0] // experts).reshape(-1, 1)
        if site.gate.keeps_zero and site.first_bias is None and site.second_bias is None:
            # A row of zeros stands for a token that did not choose this expert; the expert need not be read for it.
            index = torch.where((rows != 0).any(-1, keepdim=True), index, experts)
        return rows, index, torch.ones_like(index, dtype=torch.float32)

    def _run(self, block: Block, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        packed = [getattr(self, name) for name in block.names]
        # Without `:=` in a generator, at which Dynamo of PyTorch 2.11 breaks the graph.
        biases = [self._parameters[leaf] for leaf in self._bias_leaves()]
        learns = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in biases)
        bias = [b if b is None or len(self.blocks) == 1 else b[list(block.experts)]
                for b in (self._bias_rows() if learns else (self.first_bias_rows, self.second_bias_rows))]
        bias = both_or_none(bias, block.spec) if learns else bias
        if torch.compiler.is_compiling() or torch._C._is_tracing() or learns or (
                torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return torch.ops.qpass.experts(x, index, weight, packed, bias, block.text)  # type: ignore[no-any-return]
        return kernel(block.spec.kernel).forms["experts"](x, index, weight, packed, bias, block.spec)  # type: ignore[no-any-return]

    def weights(self, which: int) -> Iterator[tuple[int, Block, Weight]]:
        """(expert, its block, its weight) of all experts in order; first (0), gate rows before up rows, or second."""
        where = {expert: (block, at) for block in self.blocks for at, expert in enumerate(block.experts)}
        for expert in range(self.site.experts):
            block, at = where[expert]
            yield expert, block, self._weight(block, at, which)

    def _weight(self, block: Block, at: int, which: int) -> Weight:
        part, tensors = block.spec.parts[which], [self.get_buffer(name) for name in block.part(which)]
        return tensors[0][at] if part is None else unpack_block(tensors, part, at)

    def dequantize(self, which: int, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One expert's first (gate rows before up rows) or second weight as quantized, float [N, K] in `dtype`, which
        is the layer's own by default."""
        block, dtype = next(b for b in self.blocks if expert in b.experts), dtype or self.dtype
        weight, part = self._weight(block, block.experts.index(expert), which), block.spec.parts[which]
        return weight.to(dtype) if isinstance(weight, Tensor) else dequantize_weight(weight, part, dtype)  # type: ignore[arg-type]

    def part_bytes(self, leaf: str) -> int:
        """Bytes that one parameter's packed weights take; gate and up stored apart share theirs evenly."""
        which = 0 if self.site.is_first(leaf) else 1
        tensors = [self.get_buffer(name) for block in self.blocks for name in block.part(which)]
        return sum(t.numel() * t.element_size() for t in tensors) // (1 if which else len(self.site.first))

    @property
    def on_disk(self) -> Disk:  # type: ignore[override]
        found: Disk = {}
        for which in (0, 1):
            for expert, block, weight in self._described(which):
                found |= describe(self.site, which, expert, block.spec.parts[which], weight)
        return found

    def _described(self, which: int) -> Iterator[tuple[int, Block, Weight]]:
        """As `weights`, each block's first expert standing for all of it: they differ in nothing but numbers."""
        one = {block.text: self._weight(block, 0, which) for block in self.blocks}
        for expert in range(self.site.experts):
            block = next(b for b in self.blocks if expert in b.experts)
            yield expert, block, one[block.text]

    def tensor_on_disk(self, name: str) -> Tensor:
        expert = int(name.partition(".")[0])
        block = next(b for b in self.blocks if expert in b.experts)
        which = int("down" in name)
        weight = self._weight(block, block.experts.index(expert), which)
        return write_expert(self.site, which, expert, block.spec.parts[which], weight)[name]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.device.type == "meta":
            destination.update({prefix + name: torch.empty(shape, dtype=dtype, device="meta")
                                for name, (dtype, shape) in self.on_disk.items()})
            return
        for which in (0, 1):
            for expert, block, weight in self.weights(which):
                written = write_expert(self.site, which, expert, block.spec.parts[which], weight)
                destination.update({prefix + name: tensor for name, tensor in written.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        given = {key.removeprefix(prefix): value for key, value in state_dict.items()
                 if key.startswith(prefix) and key.removeprefix(prefix).partition(".")[0].isdecimal()}
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in given
                or not key.startswith(prefix)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        read: tuple[dict[int, Weight], dict[int, Weight]] = {}, {}
        try:
            for which in (0, 1):
                for expert, block, _ in self._described(which):
                    read[which][expert] = read_expert(self.site, which, expert, block.spec.parts[which], given,
                                                      self.dtype)
        except KeyError as error:
            missing_keys.append(prefix + str(error.args[0]))
            return
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        self._repack(lambda which, expert: read[which][expert], lambda spec: spec, self.device)
        self._refresh_biases()

    def _repack(self, weight: Callable[[int, int], Weight], on: Callable[[ExpertsSpec], ExpertsSpec],
                device: torch.device) -> None:
        blocks, self.blocks = self.blocks, []
        for block in blocks:
            for name in block.names:
                del self._buffers[name]
            self.put_block(on(block.spec), block.experts, (_placed(weight(0, e), device) for e in block.experts),
                           (_placed(weight(1, e), device) for e in block.experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        names = {name for block in self.blocks for name in block.names
                 if not name.endswith("_weight") or not self._buffers[name].is_floating_point()}  # type: ignore[union-attr]
        held = {name: self._buffers.pop(name) for name in names}
        try:
            packed = {name: moved(fn, tensor) for name, tensor in held.items() if tensor is not None}
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            held = dict(packed)
        finally:
            self._buffers.update(held)
        self.dtype = probe.dtype if probe.dtype.is_floating_point else self.dtype
        if probe.device.type != "meta" and any(self._refuses(block) for block in self.blocks):
            read = [{e: w for e, _, w in self.weights(which)} for which in (0, 1)]
            self._repack(lambda which, expert: read[which][expert], self._chosen_anew, probe.device)
        return self

    def _call(self, spec: ExpertsSpec) -> ExpertsCall:
        return ExpertsCall(spec=spec, device=self.device, dtype=self.dtype, bias=self.site.first_bias is not None)

    def _refuses(self, block: Block) -> bool:
        call = self._call(block.spec)
        return kernel(block.spec.kernel).why_not(call) is not None or any(
            kernel(part.spec.kernel).why_not(part) is not None for part in call.parts())

    def _chosen_anew(self, spec: ExpertsSpec) -> ExpertsSpec:
        plain = spec.on("experts_reference", "linear_reference", "linear_reference")
        return choose_experts(self._call(plain), where=self.site.owner, prepare=True)[0]

    def renew(self) -> None:
        """Take the biases and buffers that the replaced module holds now."""
        self._parameters.update({leaf: p for leaf, p in self.origin[0]._parameters.items()
                                 if leaf not in self.site.parameters})
        self._buffers.update(self.origin[0]._buffers)
        self._refresh_biases()

    def _refresh_biases(self) -> None:
        with torch.no_grad():
            first, second = self._bias_rows()
        self.register_buffer("first_bias_rows", first, persistent=False)
        self.register_buffer("second_bias_rows", None if second is None else second.detach(), persistent=False)

    def _bias_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Biases [E, N] gate first, as the kernels take them."""
        site, first = self.site, None
        if site.first_bias is not None:
            first = gate_first(site, [self.get_parameter(leaf).t() for leaf in site.first_bias]).t().contiguous()
        return first, None if site.second_bias is None else self.get_parameter(site.second_bias)

    def _bias_leaves(self) -> tuple[str, ...]:
        """Names of the parameters that are biases."""
        return (*(self.site.first_bias or ()), *filter(None, (self.site.second_bias,)))

    def extra_repr(self) -> str:
        return "; ".join(f"{len(b.experts)} of {self.site.experts}: {b.text}" if len(self.blocks) > 1 else b.text
                         for b in self.blocks)


def _take(argument: Argument, args: Any, kwargs: Any) -> Tensor:
    return args[argument.position] if argument.position < len(args) else kwargs[argument.name]  # type: ignore[no-any-return]


def _placed(weight: Weight, device: torch.device) -> Weight:
    if isinstance(weight, Tensor):
        return weight.to(device)
    return replace(weight, tensors={name: tensor.to(device) for name, tensor in weight.tensors.items()})
