"""Support matrix: the table of kernels in, a row for each out: what it computes, needs, and whether it runs here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.cuda.capability import CAPABILITIES, assume
from qpass.kernels.cuda.proven import PROVEN
from qpass.kernels.isa import machine_refuses
from qpass.kernels.registry import KERNELS, ExpertsCall, Kernel, LinearCall, load_builtin
from qpass.scheme import PRESETS, ActivationArgs, RowCodec, Scheme, WeightArgs, codec_of
from qpass.spec import LinearSpec

# Each is tried on every kernel, on a weight that all of them divide, so that a row says what the kernel itself says.
_GRANULARITIES: tuple[tuple[str, dict[str, object]], ...] = (
    ("g32", {"granularity": "per_group", "group_size": 32}), ("g64", {"granularity": "per_group", "group_size": 64}),
    ("g128", {"granularity": "per_group", "group_size": 128}),
    ("channel", {"granularity": "per_channel", "group_size": None}),
    ("tensor", {"granularity": "per_tensor", "group_size": None}))
_GROUPINGS = (("g16", "per_group", 16), ("g32", "per_group", 32), ("g64", "per_group", 64), ("g128", "per_group", 128),
              ("b128", "per_block", 128), ("channel", "per_channel", None), ("tensor", "per_tensor", None))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class SupportRow:
    """One kernel. `runs_here` is False if this machine or device lacks something, and `why_not` says what.

    weights, activations and dtypes are those the kernel takes at 1024x1024; whether it takes a given layer is for
    qpass.plan to say. Weights say the granularity, `asym` is added where zero points are taken too.
    gpus are the NVIDIA generations that have what a kernel for `cuda` needs, each with the dtypes it lacks there, and
    proven those on which its results were compared with the reference; with none, it was only interpreted.
    """

    kernel: str
    scheme: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    dtypes: tuple[str, ...]
    isa: str | None
    device: str
    priority: int
    runs_here: bool
    why_not: str = ""
    gpus: tuple[str, ...] = ()
    proven: tuple[str, ...] = ()

    @property
    def interpreted_only(self) -> bool:
        """Whether it is a kernel for GPUs that has never run on one: tested in Triton's interpreter or on the CPU."""
        return self.device == "cuda" and not self.proven


@dataclass(frozen=True, kw_only=True)
class SupportMatrix:
    """All kernels, in the order in which they are asked. `str()` is an aligned table; what runs here stands first."""

    rows: tuple[SupportRow, ...]

    def __str__(self) -> str:
        heads = ("kernel", "scheme", "weights", "activations", "dtypes", "needs", "device", "here")
        table = [heads, *(_cells(row) for row in sorted(self.rows, key=lambda row: not row.runs_here))]
        widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def support_matrix() -> SupportMatrix:
    """What each registered kernel computes and whether it runs on this machine; compiles and runs nothing."""
    load_builtin()
    ordered = sorted(KERNELS.values(), key=lambda k: (-k.priority, k.name))
    return SupportMatrix(rows=tuple(_row(k) for k in ordered))


def _row(kernel: Kernel) -> SupportRow:
    families = (kernel.scheme,) if isinstance(kernel.scheme, str) else kernel.scheme
    probes = [probe for family in families for probe in _family_probes(family)]
    with assume(max(CAPABILITIES)) if kernel.device == "cuda" else nullcontext():
        taken = [(label, act, dtype) for label, act, spec in probes for dtype in _DTYPES
                 if kernel.takes(_call(kernel, spec, dtype)) is None]
    why = _device_refuses(kernel.device) or machine_refuses(kernel.isa) or ""
    return SupportRow(kernel=kernel.name, scheme="every scheme" if kernel.scheme == "*" else ", ".join(families),
                      weights=_merged([label for label, _, _ in taken]),
                      activations=_once([act for _, act, _ in taken]),
                      dtypes=_once([_short(dtype) for _, _, dtype in taken]), isa=kernel.isa,
                      device="every device" if kernel.device == "*" else kernel.device, priority=kernel.priority,
                      runs_here=not why, why_not=why, gpus=_gpus(kernel, [spec for _, _, spec in probes]),
                      proven=PROVEN.get(kernel.name, ()))


def _gpus(kernel: Kernel, specs: Sequence[LinearSpec]) -> tuple[str, ...]:
    """`sm_80`, `sm_75 without bf16`: the generations on which a kernel for CUDA takes anything."""
    if kernel.device != "cuda":
        return ()
    found = []
    with assume(max(CAPABILITIES)):
        every = [d for d in _DTYPES if any(kernel.takes(_call(kernel, spec, d)) is None for spec in specs)]
    for number in CAPABILITIES:
        with assume(number):
            lacks = [_short(d) for d in every if all(kernel.takes(_call(kernel, spec, d)) for spec in specs)]
        if len(lacks) < len(every):
            found.append(f"sm_{number}" + (f" without {' '.join(lacks)}" if lacks else ""))
    return tuple(found)


def _schemes(family: str) -> list[Scheme]:
    """The registered schemes that a kernel for `family` is about; one of each weight type and width is enough."""
    found = {(s.weight.type, s.weight.bits, s.activation is None): s for s in PRESETS.values()
             if (family == "*" and (s.activation is None or s.activation.number == "int8"))
             or (s.family == family and s.weight.type == "int")}
    return list(found.values())


def _family_probes(family: str) -> list[tuple[str, str, LinearSpec]]:
    return [probe for scheme in _schemes(family) for probe in _probes(scheme)] or _codec_probes(family)


def _codec_probes(family: str) -> list[tuple[str, str, LinearSpec]]:
    """The same for a family of weights that a codec stores, `mxfp4_w4a16` say, in every grouping that it can store."""
    parts = re.fullmatch(r"(\w+)_w(\d)a(16|fp8)", family)
    if parts is None:
        return []
    kind, bits = parts[1], int(parts[2])
    activations: tuple[tuple[str, ActivationArgs | None], ...] = (("float", None),) if parts[3] == "16" else (
        ("fp8", ActivationArgs(type="float")),
        ("fp8 g128", ActivationArgs(type="float", granularity="per_group", group_size=128)))
    found = []
    for label, granularity, size in _GROUPINGS:
        weight = WeightArgs(bits=bits, type=kind, granularity=granularity, group_size=size)  # type: ignore[arg-type]
        codec = codec_of(weight)
        try:
            if isinstance(codec, RowCodec):
                codec.stored(weight, (_SIZE, _SIZE))
        except ValueError:  # not a grouping of this format
            continue
        found += [(label, name, LinearSpec(family=family, weight=weight, activation=activation, out_features=_SIZE,
                                           in_features=_SIZE)) for name, activation in activations]
    return found


def _probes(scheme: Scheme) -> list[tuple[str, str, LinearSpec]]:
    activations: list[tuple[str, ActivationArgs | None]] = [("float", None)]
    if scheme.activation is not None:
        activations = [(scheme.activation.number, scheme.activation)]
    if scheme.activation is not None and scheme.activation.number == "int8":
        activations = [("int8", ActivationArgs()), ("int8 asym", ActivationArgs(symmetric=False)),
                       ("int8 static", ActivationArgs(granularity="per_tensor", dynamic=False))]
    found = []
    for label, change in _GRANULARITIES:
        for symmetric in (True, False):
            weight: WeightArgs = replace(scheme.weight, symmetric=symmetric, scales="amax",
                                         **change)  # type: ignore[arg-type]
            for act_label, activation in activations:
                spec = LinearSpec(family=scheme.family, weight=weight, activation=activation, out_features=_SIZE,
                                  in_features=_SIZE)
                found.append((label if symmetric else f"{label} asym", act_label, spec))
    return found


def _call(kernel: Kernel, spec: LinearSpec, dtype: torch.dtype) -> LinearCall | ExpertsCall:
    """A product with the weight of `spec`, or experts of which both weights have it."""
    if kernel.op == "linear":
        return LinearCall(spec=spec, device=_device(kernel), dtype=dtype)
    part = spec.on(kernel.linear or spec.kernel)
    up = replace(part, out_features=2 * _SIZE)
    experts = ExpertsSpec(experts=8, hidden=_SIZE, intermediate=_SIZE, gate=Gate(function="silu"), up=up, down=part)
    return ExpertsCall(spec=experts, device=_device(kernel), dtype=dtype)


def _device(kernel: Kernel) -> torch.device:
    return torch.device("cpu" if kernel.device == "*" else kernel.device)


def _device_refuses(device: str) -> str | None:
    if device in ("*", "cpu", "meta"):
        return None
    module = getattr(torch, device, None)
    available = getattr(module, "is_available", None)
    return None if available is not None and available() else f"there is no {device} device here"


def _merged(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels once each; `g32` and `g32 asym` become `g32`, with one `asym` at the end if all have it."""
    once = _once(labels)
    plain = [label for label in once if not label.endswith(" asym")]
    zero_points = [label.removesuffix(" asym") for label in once if label.endswith(" asym")]
    if zero_points and zero_points == plain:
        return (*plain, "asym")
    return once


def _once(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _cells(row: SupportRow) -> tuple[str, ...]:
    every = (*(label for label, _ in _GRANULARITIES), "asym")
    each = {text for label, _ in _GRANULARITIES for text in (label, f"{label} asym")}
    weights = "all, asym too" if row.weights == every or each <= set(row.weights) else " ".join(row.weights)
    count = row.scheme.count(", ") + 1
    scheme = "" if f"_{row.scheme}_" in row.kernel else row.scheme if count == 1 else f"{count} families"
    return (row.kernel, scheme, weights,
            ", ".join(label.removeprefix("int8 ") for label in row.activations), " ".join(row.dtypes),
            row.isa or "nothing", row.device,
            ("yes" if row.runs_here else f"no: {row.why_not}") + ("; interpreted only" if row.interpreted_only else ""))
