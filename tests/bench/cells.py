"""Cells: what the kernels benchmark times, against whom, and the goals; data only."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096), (14336, 4096))
"""(N, K)."""
TOKENS = (1, 4, 16, 64, 256, 1024)
FEWER = (SHAPES[0], SHAPES[2], SHAPES[4])
"""What tables besides the first are measured at, unless everything is asked for."""
ROTATE = 600 << 20
"""Bytes of weights in rotation at up to 16 tokens, so that they come from memory."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A lane of a table: which peer, which of its variants. `joined`: several weights as one of all their outputs."""

    label: str
    peer: str
    variant: str
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`subject` is to be at least `ratio` times as fast as `peer` at each of `tokens` and at every shape."""

    subject: str
    peer: str
    tokens: tuple[int, ...]
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns side by side at every (shape, tokens); the first is the subject that the others' ratios are of."""

    name: str
    columns: tuple[Column, ...]
    goals: tuple[Goal, ...] = ()
    shapes: tuple[tuple[tuple[int, ...], int], ...] = tuple(((n,), k) for n, k in FEWER)
    tokens: tuple[int, ...] = TOKENS


def _ours(label: str, variant: str, **more: bool) -> Column:
    return Column(label=label, peer="qpass", variant=variant, **more)


_G128, _INT, _CHANNEL = "qpass w4a8 g128", "qpass w4a8 g128 int", "qpass w4a8 channel"
_W8A8, _W4A16 = "qpass w8a8", "qpass w4a16 g128"
_Q4, _Q8, _SGL = "llama.cpp Q4_0", "llama.cpp Q8_0", "vLLM w8a8 sgl"
_LARGE = (64, 256, 1024)

W4A8 = Table(
    name="W4A8", shapes=tuple(((n,), k) for n, k in SHAPES),
    columns=(
        _ours(_G128, "w4a8_g128"), _ours(_INT, "w4a8_g128_int"), _ours(_CHANNEL, "w4a8_channel"),
        Column(label=_Q4, peer="llama.cpp", variant="Q4_0"),
        Column(label="OpenVINO int4", peer="OpenVINO", variant="w4_g128_dq128"),
        Column(label="vLLM w4a8", peer="vLLM", variant="w4a8_g128"),
        Column(label="onnxruntime w4", peer="onnxruntime", variant="w4_g32")),
    goals=(
        Goal(subject=_G128, peer=_Q4, tokens=(1,), ratio=1.10),
        Goal(subject=_G128, peer="vLLM w4a8", tokens=(4,), ratio=1.15),
        Goal(subject=_G128, peer="OpenVINO int4", tokens=(16,), ratio=2.0),
        Goal(subject=_G128, peer="vLLM w4a8", tokens=_LARGE, ratio=2.0),
        Goal(subject=_INT, peer="vLLM w4a8", tokens=_LARGE, ratio=3.0),
        Goal(subject=_CHANNEL, peer="vLLM w4a8", tokens=_LARGE, ratio=3.0),
        Goal(subject=_G128, peer=_Q4, tokens=(4, 16, *_LARGE), ratio=1.0)))

W8A8 = Table(
    name="W8A8",
    columns=(
        _ours(_W8A8, "w8a8_channel"), Column(label=_Q8, peer="llama.cpp", variant="Q8_0"),
        Column(label=_SGL, peer="vLLM", variant="w8a8_sgl"),
        Column(label="vLLM w8a8 oneDNN", peer="vLLM", variant="w8a8_onednn"),
        Column(label="torch oneDNN static", peer="torch", variant="onednn_w8a8_static"),
        Column(label="Inductor max-autotune", peer="torch", variant="inductor_w8a8"),
        Column(label="OpenVINO int8", peer="OpenVINO", variant="w8_channel_dq32"),
        Column(label="onnxruntime w8", peer="onnxruntime", variant="w8_g32")),
    goals=(
        *(Goal(subject=_W8A8, peer=peer, tokens=(m,), ratio=ratio) for m, ratio in ((1, 1.05), (4, 1.2), (16, 1.1))
          for peer in (_Q8, _SGL)),
        Goal(subject=_W8A8, peer=_SGL, tokens=_LARGE, ratio=1.3),
        Goal(subject=_W8A8, peer="torch oneDNN static", tokens=_LARGE, ratio=1.3),
        Goal(subject=_W8A8, peer="Inductor max-autotune", tokens=_LARGE, ratio=1.0),
        Goal(subject=_W8A8, peer=_Q8, tokens=_LARGE, ratio=1.0)))

W4A16 = Table(
    name="W4A16",
    columns=(
        _ours(_W4A16, "w4a16_g128"), Column(label="aten int4pack", peer="torch", variant="int4pack_w4a16"),
        Column(label="OpenVINO int4 float", peer="OpenVINO", variant="w4_g128_dq0"),
        Column(label="bf16 F.linear", peer="torch", variant="bf16")),
    goals=tuple(Goal(subject=_W4A16, peer=peer, tokens=tokens, ratio=ratio)
                for tokens, ratio in (((1,), 1.9), (_LARGE, 1.4)) for peer in ("aten int4pack", "OpenVINO int4 float")))

W8A16 = Table(
    name="W8A16", tokens=(1, 16, 256), shapes=(((4096,), 4096),),
    columns=(_ours("qpass w8a16 channel", "w8a16_channel"), _ours("qpass w8a16 g128", "w8a16_g128"),
             Column(label="aten int8pack", peer="torch", variant="int8pack_w8a16")))

_BF16 = "bf16 F.linear"
_FOURS = {"qpass mxfp4": "mxfp4a16", "qpass nvfp4": "nvfp4a16", "qpass nf4": "nf4"}
_EIGHTS = {"qpass fp8": "fp8_dynamic", "qpass fp8 block": "fp8_block", "qpass mxfp8": "mxfp8a16",
           "qpass mxfp6": "mxfp6a16"}
FLOATS = Table(
    name="Float weights", tokens=(1, 4, 16, 64, 256), shapes=(((4096,), 4096), ((14336,), 4096)),
    columns=(*(_ours(label, variant) for label, variant in {**_FOURS, **_EIGHTS}.items()),
             Column(label=_BF16, peer="torch", variant="bf16")),
    goals=(*(Goal(subject=label, peer=_BF16, tokens=(1,), ratio=3.0) for label in _FOURS),
           *(Goal(subject=label, peer=_BF16, tokens=(1,), ratio=1.8) for label in ("qpass fp8", "qpass fp8 block")),
           *(Goal(subject=label, peer=_BF16, tokens=(256,), ratio=0.95) for label in (*_FOURS, "qpass fp8"))))

FORMS = Table(
    name="W4A8, other forms", tokens=(1, 16, 256), shapes=(((4096,), 4096),),
    columns=(
        _ours(_G128, "w4a8_g128"), _ours("g64", "w4a8_g64"), _ours("g32", "w4a8_g32"), _ours("g32 int", "w4a8_g32_int"),
        _ours("g128 asym", "w4a8_g128_asym"), _ours("g32 asym", "w4a8_g32_asym"),
        _ours("channel asym", "w4a8_channel_asym"),
        _ours("g128 static input", "w4a8_g128_static")))

LISTS = Table(
    name="W4A8, several weights in one call", tokens=(1, 16, 256),
    shapes=(((2048, 512, 512), 2048), ((8192, 8192), 2048)),
    columns=(
        _ours("qpass list", "w4a8_g128"), _ours("qpass joined", "w4a8_g128", joined=True),
        Column(label=_Q4, peer="llama.cpp", variant="Q4_0", joined=True)),
    goals=(Goal(subject="qpass list", peer=_Q4, tokens=(1,), ratio=1.10),))

TABLES = (W4A8, W8A8, W4A16, W8A16, FLOATS, FORMS, LISTS)
