"""Algorithm: the name and settings of one step of calibration, as a recipe lists them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from qpass.errors import RecipeError
from qpass.recipes.algorithm_table import ALGORITHMS, Algorithm, register_algorithm
from qpass.recipes.rotation import Rotation as Rotation

SCALE_METHODS: tuple[str, ...] = ("absmax", "signed", "search", "hqq")


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class Scales(Algorithm):
    """Better group scales, then rounding to nearest.

    Searches weigh the error of each column by the energy of its input's channel, as the calibration data shows it or,
    without any, a few tokens drawn at random, which tell nearly as much.

    method  absmax: amax(|w|) / ((qmax - qmin) / 2), as without this algorithm
            search: ranges in small steps, the best by squared error and by how much the group shrinks
            signed: the same, and the scale may be negative, so that the longer end of the grid, -2^(bits-1), serves
                    whichever side has the largest weight
            hqq:    half-quadratic solver (Badri and Shaji, 2023), error in the p-norm, p = 0.7
    probe   how many tokens are drawn if there is no calibration data; 0 looks at the weights alone
    """

    name: ClassVar[str] = "scales"
    needs_data: ClassVar[bool] = False
    wiring: ClassVar[str] = "qpass.calibrate.scales"
    propagate: ClassVar[bool] = False
    method: str = "signed"
    probe: int = 256

    @property
    def searches(self) -> bool:
        """Whether the method weighs the errors of columns."""
        return self.method in ("search", "signed")

    @property
    def drawn_tokens(self) -> int:
        """As set, for a search."""
        return self.probe if self.searches else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.method in SCALE_METHODS, "method", " or ".join(SCALE_METHODS))
        self.check_type("probe", int)
        self.check(0 <= self.probe <= 1 << 20, "probe", "a number of tokens, 0 for none")


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class Gptq(Algorithm):
    """GPTQ (Frantar et al., 2022): columns rounded one after another, each error spread over those still to come.

    dampening_frac  part of the Hessian's mean diagonal that is added to the diagonal; raised tenfold, and said, where
                    the Hessian is not positive definite
    block_size      columns whose errors are spread at once, 64 at the most; a matter of speed alone
    actorder        "static": columns in order of falling activation energy, groups and scales as without (nothing on
                    disk changes); None: as they stand
    scales          how the scales are found, see Scales.method
    propagate       the inputs of a block carry the errors of the blocks quantized before it; costs one more run of
                    each block
    match_float     a layer's target is what the float model computes there, its output or, where that is added to
                    another tensor, the sum, so that it makes up for errors of the layers before it, as far as two
                    halves of the samples confirm each other; layers of a block are rounded one after another, each on
                    what those before it give. Needs `propagate`; False is the algorithm as published, in about half
                    the time
    refit           the scales are fitted to the integers found, by least squares on the outputs
    sweeps          how often each integer is then looked at again with all others known, and moved where the outputs'
                    error is smallest (coordinate descent; a refit follows each); 0 is the algorithm as published
    """

    name: ClassVar[str] = "gptq"
    wiring: ClassVar[str] = "qpass.calibrate.gptq"
    dampening_frac: float = 0.01
    block_size: int = 128
    actorder: str | None = "static"
    scales: str = "signed"
    propagate: bool = True
    match_float: bool = True
    refit: bool = True
    sweeps: int = 3

    @property
    def matches_float(self) -> bool:
        """As set, if errors are propagated: otherwise there are none to make up for."""
        return self.match_float and self.propagate

    @property
    def needs_targets(self) -> bool:
        """Not where it runs the float block itself: that run gives them."""
        return not self.matches_float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_type("match_float", bool)
        self.check_type("refit", bool)
        self.check_type("dampening_frac", float, int)
        self.check(0 <= self.dampening_frac < 10, "dampening_frac", "from 0 to 10")
        self.check_type("sweeps", int)
        self.check(0 <= self.sweeps <= 100, "sweeps", "from 0 to 100")
        self.check_type("block_size", int)
        self.check(self.block_size > 0, "block_size", "positive")
        self.check(self.actorder in ("static", None), "actorder", "'static' or None")
        self.check(self.scales in SCALE_METHODS, "scales", " or ".join(SCALE_METHODS))
        self.check_type("propagate", bool)


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Algorithm):
    """SmoothQuant (Xiao et al., 2022): each input channel is divided by s and its weights multiplied by s.

    alpha  s = amax(|x|)^alpha / amax(|w|)^(1 - alpha), per channel; 0.5 shares the difficulty evenly. None: for each
           input the one, or none at all, with which its rounded products come nearest to the float ones

    run_time  where nothing can take the division: the layers do it themselves, which no other reader of the checkpoint
              knows of; False leaves such an input alone. Either is named in the report

    The division is folded into what produces the input (a norm, a linear), as the graph shows it.
    """

    name: ClassVar[str] = "smoothquant"
    wiring: ClassVar[str] = "qpass.calibrate.smoothquant"
    rounds: ClassVar[bool] = False
    alpha: float | None = None
    run_time: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_type("run_time", bool)
        self.check_type("alpha", float, int, type(None))
        self.check(self.alpha is None or 0 <= self.alpha <= 1, "alpha", "None, or from 0 to 1")


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class AutoRound(Algorithm):
    """AutoRound (Cheng et al., 2023): rounding and scales moved by signed gradients to match a whole block's output.

    iterations  steps; each draws `batch_size` samples and moves every rounding of the block at once
    step_size   of a rounding, in grid steps, at first; it falls linearly to 0. None is 1 / iterations
    scale_step  step of a scale, as a part of the rounding's; 0 leaves the scales
    scales      how the scales are found at first, see Scales.method; after gptq its scales and integers are the start
    """

    name: ClassVar[str] = "autoround"
    wiring: ClassVar[str] = "qpass.calibrate.autoround"
    iterations: int = 200
    batch_size: int = 8
    step_size: float | None = None
    scale_step: float = 1.0
    scales: str = "absmax"

    @property
    def matches_float(self) -> bool:
        """Always: the block's float output is what it matches."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("iterations", "batch_size"):
            self.check_type(field, int)
            self.check(getattr(self, field) > 0, field, "positive")
        self.check(self.step_size is None or 0 < self.step_size <= 1, "step_size", "None, or from 0 to 1")
        self.check_type("scale_step", float, int)
        self.check(self.scale_step >= 0, "scale_step", "0 or more")
        self.check(self.scales in SCALE_METHODS, "scales", " or ".join(SCALE_METHODS))


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class Awq(Algorithm):
    """AWQ (Lin et al., 2023): factors a channel, searched so that rounding changes the outputs least, and folded.

    grid         how many exponents are tried
    duo_scaling  the factors look at the weights too, not at the activation alone
    clip         ranges are searched afterwards with errors weighed by the input's energy, and the sites rounded on them
    run_time     as of SmoothQuant
    """

    name: ClassVar[str] = "awq"
    wiring: ClassVar[str] = "qpass.calibrate.awq"
    rounds: ClassVar[bool] = False
    grid: int = 20
    duo_scaling: bool = True
    clip: bool = False
    run_time: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_type("grid", int)
        self.check(self.grid > 0, "grid", "positive")
        self.check_type("duo_scaling", bool)
        self.check_type("clip", bool)
        self.check_type("run_time", bool)


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class ActivationRanges(Algorithm):
    """How the range of a static activation scale is found; without it, minmax.

    method      minmax: from the smallest to the largest value; percentile: what holds `percentile` per cent of the
                values; mse: the range whose rounding has the smallest squared error
    """

    name: ClassVar[str] = "activation_ranges"
    wiring: ClassVar[str] = "qpass.calibrate.activation_range"
    rounds: ClassVar[bool] = False
    method: str = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.method in ("minmax", "percentile", "mse"), "method", "minmax, percentile or mse")
        self.check_type("percentile", float, int)
        self.check(50 <= self.percentile <= 100, "percentile", "from 50 to 100")


@register_algorithm
@dataclass(frozen=True, kw_only=True)
class BiasCorrection(Algorithm):
    """Bias correction (Nagel et al., 2019): each bias takes up the mean change of its layer's output.

    The mean is over all tokens, against the float model on its own inputs. It works on rounded weights, so it stands
    last in a recipe; what nothing has rounded is rounded to nearest. Layers without a bias are named in the report.
    """

    name: ClassVar[str] = "bias_correction"
    wiring: ClassVar[str] = "qpass.calibrate.bias_correction"

    @property
    def matches_float(self) -> bool:
        """Always: the float model's mean outputs are the target."""
        return True


def as_algorithm(value: object) -> Algorithm:
    """An Algorithm from one, from a name, or from {name: settings}; RecipeError names what is allowed."""
    if isinstance(value, Algorithm):
        return value
    name: object = value
    settings: object = {}
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise RecipeError(f"an algorithm is a name or {{name: settings}}, got {dict(value)!r}")
        name, settings = next(iter(value.items()))
        settings = {} if settings is None else settings
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        raise RecipeError(f"an algorithm is a name or {{name: settings}}, got {value!r}")
    kind = ALGORITHMS.get(name.lower())
    if kind is None:
        near = difflib.get_close_matches(name.lower(), ALGORITHMS, n=1)
        raise RecipeError(f"no algorithm is named {name!r}" + (f"; closest: {near[0]}" if near else "")
                          + f" (there are {', '.join(ALGORITHMS)})")
    allowed = [f.name for f in fields(kind)]
    if unknown := [key for key in settings if key not in allowed]:
        raise RecipeError(f"unknown setting {unknown[0]!r} of algorithm {name}; allowed: {', '.join(allowed)}")
    return kind(**{str(key): setting for key, setting in settings.items()})
