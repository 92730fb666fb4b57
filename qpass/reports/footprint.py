"""Footprint: an empty model and its plan in; what the quantized model will take on disk, in memory and a token, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qpass.decide.decision import Decision
from qpass.reports.text_table import human_bytes


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a whole model, also of what no product reads. `str()` is three lines.

    float_disk   of the float checkpoint
    disk         of the quantized one; a table tied to a packed head stands there in float too, for other readers
    memory       of the quantized model
    peak         while it is quantized as it is read: memory and the largest tensor, or weights of one layer's experts;
                 some 400 MB of Python, PyTorch and Transformers come on top
    a_token      what decoding reads for one token
    kernels      how many layers run on which kernel of this machine; "float" for those that stay
    """

    float_disk: int
    disk: int
    memory: int
    peak: int
    a_token: int
    kernels: Mapping[str, int]

    def __str__(self) -> str:
        runs = ", ".join(f"{count} on {name}" if name != "float" else f"{count} in float"
                         for name, count in self.kernels.items())
        return (f"on disk {human_bytes(self.disk)} (float {human_bytes(self.float_disk)}), in memory "
                f"{human_bytes(self.memory)}, at most {human_bytes(self.peak)} while loading\n"
                f"decoding reads {human_bytes(self.a_token)} a token\n"
                f"products: {runs}")


def footprint_of(model: nn.Module, decisions: Sequence[Decision]) -> Footprint:
    """What `model`, whose weights may be on the meta device, takes once these decisions are carried out."""
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    whole = sum(sizes.values()) + sum(b.numel() * b.element_size() for b in model.buffers())
    sites = {id(p): 0 for d in decisions if (p := _parameter(model, d)) is not None}
    other = sum(size for key, size in sizes.items() if key not in sites)
    tables = sum(d.site.numel * d.site.dtype.itemsize for d in decisions
                 if d.site.kind == "embedding" and d.site.aliases and d.bytes_after == 0)
    after = sum(d.bytes_after for d in decisions)
    packed = sum(d.bytes_before - d.bytes_packed for d in decisions)
    together: Counter[str] = Counter()
    for d in decisions:
        together[d.site.name if d.site.experts is None else d.site.owner] += d.site.numel * d.site.dtype.itemsize
    kernels = Counter(d.kernel or (d.spec.kernel if d.spec is not None else "float")
                      for d in decisions if d.site.kind != "embedding")
    return Footprint(float_disk=sum(sizes.values()), disk=after + other + tables, memory=whole - packed,
                     peak=whole - packed + max(together.values(), default=0), kernels=dict(kernels.most_common()),
                     a_token=other + sum(d.bytes_a_token for d in decisions))


def _parameter(model: nn.Module, decision: Decision) -> nn.Parameter | None:
    path, _, leaf = decision.site.name.rpartition(".")
    return model.get_submodule(path)._parameters.get(leaf)
