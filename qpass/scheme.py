"""Scheme: what the numbers are, of a weight and of the activation it meets; and the table of presets.

A preset has exactly the types, granularity and symmetry of the compressed-tensors preset of that name
(compressed-tensors 0.20, `quantization/quant_scheme.py`), in lower case. `w4a8_channel` is the channelwise recipe
of vLLM's W4A8 page: int4 per output channel, int8 asymmetric per token. The `_static` ones are those with activations
int8 per tensor whose scale is calibrated: vLLM's CompressedTensorsW8A8Int8 with a static input scheme.
`w4a8_int_scales` is `w4a8` with scales that are integers times a scale of their row.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from qpass.activation_args import ActivationArgs as ActivationArgs
from qpass.activation_args import Granularity as Granularity
from qpass.activation_args import activation_words as activation_words
from qpass.dtype import DType, dtype_name
from qpass.errors import DuplicateRegistration, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Codec(Protocol):
    """How a number format of one's own stores a weight: the two directions, in plain torch.

    `names` are the tensors it makes, in order; `weight_<name>` is how each is called in a checkpoint.
    """

    names: tuple[str, ...]

    def quantize(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        """`weight` float32 [N, K] to named tensors, any shapes and dtypes."""

    def dequantize(self, tensors: dict[str, Tensor], group_size: int) -> Tensor:
        """The named tensors back to float32 [N, K]."""


@dataclass(frozen=True, kw_only=True)
class WeightArgs:
    """The numbers of a weight [N, K]; groups run along K.

    `type` is "int" or the name of a registered codec. `group_size` is set for per_group, and for per_block, where it
    is the side of a square block [group_size, group_size] (the last ones of a row or column may be smaller).
    `scales` says how scales are chosen, not how they are stored: "amax" from the largest weight, as compressed-tensors
    does; "integer" as an integer times a scale of the row (qpass/integer_scales.py), which lets kernels add up all
    groups in integers.
    """

    bits: int
    type: str = "int"
    granularity: Granularity = "per_channel"
    group_size: int | None = None
    symmetric: bool = True
    scales: Literal["amax", "integer"] = "amax"

    def __post_init__(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"symmetric must be True or False, got {self.symmetric!r}")
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"weight bits must be 1 to 8, got {self.bits}")
        if self.type == "int" and self.bits < 2:
            raise RecipeError("int weights need at least 2 bits; register a codec for 1-bit formats")
        if self.granularity not in ("per_tensor", "per_channel", "per_group", "per_block"):
            raise RecipeError("weight granularity must be per_tensor, per_channel, per_group or per_block, "
                              f"got {self.granularity!r}")
        if self.type == "int" and self.granularity == "per_block":
            raise RecipeError("int weights have no blocks; use granularity='per_group'")
        if (self.granularity in ("per_group", "per_block")) != (self.group_size is not None):
            raise RecipeError("group_size goes with granularity='per_group' or 'per_block', and only with them; "
                              f"got {self.granularity!r} and group_size={self.group_size}")
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError(f"group_size must be positive, got {self.group_size}; "
                              "use granularity='per_channel' for one group a row")
        if self.scales not in ("amax", "integer"):
            raise RecipeError(f"weight scales must be amax or integer, got {self.scales!r}")
        if self.scales == "integer" and (self.type != "int" or self.bits > 4 or not self.symmetric
                                         or self.granularity != "per_group"):
            raise RecipeError("scales='integer' goes with symmetric int weights of 2 to 4 bits in groups; got "
                              f"{self.number}, {self.granularity}, symmetric={self.symmetric}")

    @property
    def number(self) -> str:
        """What a weight is in short: `int4`, `fp8`, `nf4`; a type whose name has no width is followed by it."""
        return self.type if any(letter.isdigit() for letter in self.type) else f"{self.type}{self.bits}"

    @property
    def grouping(self) -> str:
        """The granularity in short: `g64`, `b128` (blocks), `channel` or `tensor`."""
        if self.group_size is None:
            return self.granularity.removeprefix("per_")
        return f"{'b' if self.granularity == 'per_block' else 'g'}{self.group_size}"


class RowCodec(ABC):
    """A codec that sees all of WeightArgs, says what its tensors look like, and decodes some rows at a time.

    The formats that come with qpass are of this kind (`qpass/codecs`, one a file). `names` are the tensors it makes;
    the one called `weight` stands in a checkpoint under that name, any other as `weight_<name>`.
    """

    names: ClassVar[tuple[str, ...]]
    one_scale: ClassVar[bool] = False  # one number scales the whole tensor: weights with one input share it

    @abstractmethod
    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        """Of each tensor of a weight [N, K]: the dtypes it may have, the first one preferred, and its shape.

        Raises ValueError if no weight of this shape can be stored.
        """

    @abstractmethod
    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """`weight` float32 [N, K], finite, to the named tensors; float scales in `scale_dtype` where that is open.

        Raises RecipeError for what can only be read.
        """

    def encode_within(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype, largest: Tensor
                      ) -> dict[str, Tensor]:
        """`encode` with the scale of a tensor whose largest magnitude is `largest`, float32 []; for `one_scale`."""
        return self.encode(weight, args, scale_dtype)

    @abstractmethod
    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        """Rows start to stop of the weight [N, K], float32 [stop - start, K]."""

    def unit(self, args: WeightArgs, shape: tuple[int, int]) -> int:
        """After how many rows nothing of the tensors spans rows before and after; 0 if nowhere."""
        return 1

    def by_rows(self, args: WeightArgs, shape: tuple[int, int]) -> WeightArgs:
        """The numbers of the same weight with nothing shared between rows, so that every tensor has N in front.

        Raises ValueError if there are none.
        """
        if self.unit(args, shape) == 0 or any(size[:1] != shape[:1] for _, size in self.stored(args, shape).values()):
            raise ValueError(f"rows of {args.type} weights share what they are stored with")
        return args

    def rows_apart(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of `by_rows`."""
        return tensors

    def check(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]) -> None:
        """Raise ValueError, saying which tensor, unless they are what `stored` says."""
        for name, (dtypes, size) in self.stored(args, shape).items():
            found, dtype = tensors[name], dtype_name(tensors[name].dtype)
            if dtype not in dtypes or tuple(found.shape) != size:
                raise ValueError(f"{tensor_on_disk(name)} is {dtype} {list(found.shape)}, and the layer "
                                 f"{list(shape)} needs {' or '.join(dtypes)} {list(size)}")


Stored = tuple[tuple[DType, ...], tuple[int, ...]]


def tensor_on_disk(name: str) -> str:
    """The name in a checkpoint of a codec's tensor, without the layer's path."""
    return name if name == "weight" else f"weight_{name}"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A named choice of weight and activation numbers. `activation=None` leaves activations in the model's dtype."""

    name: str
    weight: WeightArgs
    activation: ActivationArgs | None = None

    def with_group_size(self, group_size: int) -> Scheme:
        """The same scheme with groups of `group_size`, named `<name>_g<group_size>`."""
        weight = replace(self.weight, granularity="per_group", group_size=group_size)
        return replace(self, name=f"{self.name}_g{group_size}", weight=weight)

    @property
    def family(self) -> str:
        """What kernels are written for: `w4a8`, `w8a16`, ..., whatever the granularity and symmetry."""
        return family_of(self.weight, self.activation)


def family_of(weight: WeightArgs, activation: ActivationArgs | None) -> str:
    """`w4a8`, `w8a16`, `w4afp8`: the types and widths of both."""
    prefix = "w" if weight.type == "int" else weight.type + "_w"
    return f"{prefix}{weight.bits}a{activation.number.removeprefix('int') if activation else 16}"


_INT8_TOKEN = ActivationArgs()
_STATIC = ActivationArgs(granularity="per_tensor", dynamic=False)
_STATIC_ASYM = replace(_STATIC, symmetric=False)


def _group(bits: int, activation: ActivationArgs | None, *, symmetric: bool = True,
           group_size: int = 128) -> dict[str, Any]:
    weight = WeightArgs(bits=bits, granularity="per_group", group_size=group_size, symmetric=symmetric)
    return {"weight": weight, "activation": activation}


PRESETS: dict[str, Scheme] = {}
# What vLLM's online quantization calls a preset (docs/features/quantization/online.md).
ALIASES = {"fp8_per_channel": "fp8_dynamic", "fp8_per_block": "fp8_block", "int8_per_channel": "w8a8",
           "int8_per_channel_weight_only": "w8a16_channel"}
_CODECS: dict[str, Codec | RowCodec] = {}


def register_codec(kind: str, codec: Codec | RowCodec) -> None:
    """Let `WeightArgs.type` be `kind`. Raises DuplicateRegistration if it has a meaning already."""
    if kind == "int" or kind in _CODECS:
        raise DuplicateRegistration(f"weight type {kind!r} has a definition already; choose another name")
    _CODECS[kind] = codec


def register_scheme(scheme: Scheme, *, codec: Codec | RowCodec | None = None) -> Scheme:
    """Add a scheme to PRESETS under its name; `codec` defines `scheme.weight.type` when that is not "int".

    Raises DuplicateRegistration if the name is taken, RecipeError if the weight type has no codec.
    """
    if scheme.name in PRESETS:
        raise DuplicateRegistration(f"a scheme named {scheme.name!r} is registered already; choose another name")
    kind = scheme.weight.type
    if codec is not None:
        if kind == "int" or kind in _CODECS:
            raise DuplicateRegistration(f"weight type {kind!r} of scheme {scheme.name!r} has a definition already; "
                                        "leave codec out, or choose another type name")
        _CODECS[kind] = codec
    elif kind != "int" and kind not in _CODECS:
        raise RecipeError(f"scheme {scheme.name!r} has weight type {kind!r}, which nothing defines; pass codec=...")
    PRESETS[scheme.name] = scheme
    return scheme


def scheme_for(weight: WeightArgs, activation: ActivationArgs | None) -> Scheme:
    """The preset with exactly these numbers, or a Scheme named after them: `w4a8_g64`, `w4a16_channel_asym`,
    `w4a8_int_scales_g64`.

    What of the activation the name does not say follows: `_xg32`, `_xtensor`, `_xstatic`, `_xlocal`, `_xasym`.
    """
    for known in PRESETS.values():
        if (known.weight, known.activation) == (weight, activation):
            return known
    unnamed = Scheme(name="", weight=weight, activation=activation)
    group = weight.grouping
    chosen = "" if weight.scales == "amax" else "_int_scales"
    name = f"{unnamed.family}{chosen}_{group}" + ("" if weight.symmetric else "_asym")
    if activation is not None:
        name += "".join(f"_x{word}" for word in activation_words(activation))
    return replace(unnamed, name=name)


def check_defined(scheme: Scheme) -> None:
    """Raise RecipeError if nothing defines the scheme's weight type."""
    kind = scheme.weight.type
    if kind != "int" and kind not in _CODECS:
        known = ", ".join(["int", *sorted(_CODECS)])
        raise RecipeError(f"scheme {scheme.name!r} has weight type {kind!r}, which nothing defines (known: {known}); "
                          "register it with qpass.register_scheme(scheme, codec=...)")


def codec_of(weight: WeightArgs) -> Codec | RowCodec | None:
    """The codec that defines this weight's type; None for the built-in integers."""
    if weight.type == "int":
        return None
    import qpass.codecs  # noqa: F401  (which registers those that come with qpass)

    return _CODECS[weight.type]


def preset(name: str) -> Scheme:
    """The preset of this name, in any case; raises RecipeError with the closest names."""
    found = PRESETS.get(name) or PRESETS.get(name.lower()) or PRESETS.get(ALIASES.get(name.lower(), ""))
    if found is None:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3)
        those = f"closest: {', '.join(near)} (all: qpass.PRESETS)" if near else f"there are {', '.join(PRESETS)}"
        raise RecipeError(f"no scheme is named {name!r}; {those}")
    return found


for _bits in (2, 3, 4, 5, 6, 7):
    register_scheme(Scheme(name=f"w{_bits}a16", **_group(_bits, None)))
    register_scheme(Scheme(name=f"w{_bits}a8", **_group(_bits, _INT8_TOKEN)))
for _bits in (2, 3, 4):
    register_scheme(Scheme(name=f"w{_bits}a4", **_group(_bits, ActivationArgs(bits=4))))
register_scheme(Scheme(name="w8a16", **_group(8, None)))
register_scheme(Scheme(name="w8a16_channel", weight=WeightArgs(bits=8)))
register_scheme(Scheme(name="w4afp8", **_group(4, ActivationArgs(type="float"))))
register_scheme(Scheme(name="w4a16_asym", **_group(4, None, symmetric=False)))
register_scheme(Scheme(name="w8a8", weight=WeightArgs(bits=8), activation=_INT8_TOKEN))
register_scheme(Scheme(name="int8", weight=WeightArgs(bits=8), activation=_INT8_TOKEN))
register_scheme(Scheme(name="w4a8_channel", weight=WeightArgs(bits=4), activation=ActivationArgs(symmetric=False)))
register_scheme(Scheme(name="w8a8_static", weight=WeightArgs(bits=8), activation=_STATIC))
register_scheme(Scheme(name="w8a8_static_asym", weight=WeightArgs(bits=8), activation=_STATIC_ASYM))
register_scheme(Scheme(name="w4a8_static", **_group(4, _STATIC)))
register_scheme(Scheme(name="w4a8_int_scales", activation=_INT8_TOKEN, weight=WeightArgs(
    bits=4, granularity="per_group", group_size=128, scales="integer")))
