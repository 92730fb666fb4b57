"""compressed-tensors config: the `quantization_config` of a config.json in, what it says of each layer out.

Source: compressed-tensors 0.20, `quantization/quant_config.py`, `quant_scheme.py` and `utils/match.py`: a layer is
matched by its exact name, then by `re:` regex, then by class name; `ignore` comes before all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qpass.errors import CheckpointError, RecipeError
from qpass.formats.compressed_tensors_floats import FLOAT_FORMATS, float_args
from qpass.formats.compressed_tensors_transform import DECOMPRESS, Mixing, read_transforms
from qpass.formats.patterns import matches
from qpass.scheme import ActivationArgs, Scheme, WeightArgs, codec_of
from qpass.spec import LinearSpec

METHOD = "compressed-tensors"
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "qpass", *FLOAT_FORMATS.values())
STRATEGY = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_token": "token"}
_GRANULARITY = {strategy: granularity for granularity, strategy in STRATEGY.items()}


@dataclass(frozen=True, kw_only=True)
class Group:
    """One config group: which layers, and which numbers."""

    name: str
    targets: tuple[str, ...]
    weight: WeightArgs
    activation: ActivationArgs | None

    def spec(self, out_features: int, in_features: int) -> LinearSpec:
        """The spec of a layer of this group, for the reference kernel. Raises ValueError if groups do not divide K."""
        size = self.weight.group_size
        if size is not None and self.weight.granularity == "per_group" and in_features % size:
            raise ValueError(f"group size {size} does not divide its {in_features} input features")
        family = Scheme(name=self.name, weight=self.weight, activation=self.activation).family
        return LinearSpec(family=family, weight=self.weight, activation=self.activation, out_features=out_features,
                          in_features=in_features)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """A `quantization_config` as read: groups in order, the targets that stay float, and what only qpass writes.

    `storage` maps layers that are no nn.Linear to {"weight", "bias", "transposed"}; weight is None for a parameter.
    `tied` maps a table of embeddings, which the files hold in float too, to the packed head whose rows it reads.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    mixings: tuple[Mixing, ...] = ()

    def mixed(self, name: str, classes: Sequence[str], channels: int) -> int | None:
        """The size of the blocks in which the layer of this name mixes its input of so many channels, if it does."""
        sizes = [mixing.size or channels for mixing in self.mixings if mixing.holds(name, classes)]
        if len(sizes) > 1 or any(size & (size - 1) or channels % size for size in sizes):
            raise CheckpointError(f"transform_config mixes the {channels} inputs of {name} in blocks of "
                                  f"{', '.join(map(str, sizes))}; one power of two that divides them is read")
        return sizes[0] if sizes else None

    def group_of(self, name: str, classes: Sequence[str]) -> Group | None:
        """The group that holds the module of this name and these classes, or the parameter of this name (no class)."""
        if any(_matches_name(target, name) or target in classes for target in self.ignore):
            return None
        by_name = [(target, group) for group in self.groups for target in group.targets if _matches_name(target, name)]
        by_name.sort(key=lambda found: found[0].startswith("re:"))
        by_class = [(target, group) for group in self.groups for target in group.targets
                    if target in classes]
        return next((group for _, group in (*by_name, *by_class)), None)


def read_config(config: Mapping[str, Any], where: str) -> LayerConfig:
    """The config of any tool as data; the inverse of write_config. `where` names the file in errors.

    Raises CheckpointError, saying which format or setting it is, for whatever this version cannot read.
    """
    method, layout = config.get("quant_method"), config.get("format")
    if method != METHOD:
        raise CheckpointError(f"{where}: the checkpoint is in format {method!r}, and this version reads only "
                              f"{METHOD!r} "
                              "(formats pack-quantized and int-quantized); load it with the tool that made it, or "
                              "quantize "
                              "the float model")
    if layout not in (*_FORMATS, None):
        raise CheckpointError(f"{where}: compressed-tensors format {layout!r} is not read by this version; it reads "
                              f"{', '.join(_FORMATS[:3])} and the formats of floats; {DECOMPRESS}")
    if (value := config.get("sparsity_config")) and value.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: sparsity_config is set, and this version cannot honour it: {value}; "
                              f"{DECOMPRESS}")
    raw = config.get("config_groups")
    if not isinstance(raw, Mapping) or not raw:
        raise CheckpointError(f"{where}: quantization_config has no config_groups, so nothing says which layers are "
                              "quantized")
    groups = tuple(_group(name, group, f"{where}: {name}") for name, group in raw.items())
    own = config.get("qpass") or {}
    groups = (*_experts(groups, own.get("experts") or {}, where), *groups)
    return LayerConfig(groups=groups, ignore=tuple(config.get("ignore") or ()), storage=own.get("layers") or {},
                       recipe=own.get("recipe"), tied=own.get("tied") or {},
                       mixings=read_transforms(config.get("transform_config"), where))


def _experts(groups: tuple[Group, ...], said: Mapping[str, Any], where: str) -> Iterator[Group]:
    """Groups that come before the others: experts by their targets, with the activations that qpass gave them."""
    for target, fields in said.items():
        named = [group for one in (target, "Linear") for group in groups if one in group.targets]
        group = named[0] if named else None
        if group is None or not isinstance(fields, Mapping):
            raise CheckpointError(f"{where}: qpass says of {target!r} what its activations are, and no group has it")
        yield replace(group, targets=(target,), activation=_activation_args(fields, where))


def _group(name: str, raw: Any, where: str) -> Group:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("weights"), Mapping):
        raise CheckpointError(f"{where} says nothing of weights; this version reads quantized weights only, got "
                              f"{raw!r}")
    weights, inputs = raw["weights"], raw.get("input_activations")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise CheckpointError(f"{where}: input_activations are {inputs!r}, and must be fields")
    if raw.get("format") not in (*_FORMATS, None):
        raise CheckpointError(f"{where}: compressed-tensors format {raw['format']!r} is not read by this version; "
                              f"it reads {', '.join(sorted({*_FORMATS} - {'qpass'}))}")
    if raw.get("output_activations"):
        raise CheckpointError(f"{where} quantizes output activations, and this version cannot")
    targets = raw.get("targets") or ()
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: targets are {targets!r}, and must be names")
    return Group(name=name, targets=tuple(targets), weight=_weight_args(weights, where),
                 activation=None if inputs is None else _activation_args(inputs, where))


def _weight_args(raw: Mapping[str, Any], where: str) -> WeightArgs:
    if raw.get("type") == "float" and not raw.get("dynamic"):
        try:
            return float_args(raw)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: cannot read weights {dict(raw)!r}: {error}") from error
    if raw.get("type", "int") == "float" or raw.get("strategy") not in (*_GRANULARITY, None) or raw.get("dynamic"):
        raise CheckpointError(f"{where}: weights of type {raw.get('type')}{raw.get('num_bits')}, strategy "
                              f"{raw.get('strategy')!r} are not read by this version; it reads int weights per tensor, "
                              "channel or group")
    size = raw.get("group_size")
    size = size if isinstance(size, int) and size > 0 else None
    strategy = raw.get("strategy") or ("group" if size else "tensor")
    try:
        args = WeightArgs(bits=raw["num_bits"], type=raw.get("type", "int"), symmetric=raw.get("symmetric", True),
                          granularity=_GRANULARITY[strategy],  # type: ignore[arg-type]
                          group_size=size if strategy == "group" else None)
        codec_of(args)
    except (RecipeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: cannot read weights {dict(raw)!r}: {error}") from error
    return args


def _activation_args(raw: Mapping[str, Any], where: str) -> ActivationArgs:
    size = raw.get("group_size")
    size = size if isinstance(size, int) and size > 0 else None
    strategy = raw.get("strategy") or ("group" if size else "tensor")
    granularity: Any = "per_group" if strategy == "tensor_group" else _GRANULARITY.get(strategy, strategy)
    try:
        return ActivationArgs(bits=raw["num_bits"], type=raw.get("type", "int"), symmetric=raw.get("symmetric", True),
                              granularity=granularity, dynamic=raw.get("dynamic", False),
                              group_size=size if granularity == "per_group" else None)
    except (RecipeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: cannot honour input_activations: {error}") from error


def _matches_name(target: str, name: str) -> bool:
    return matches(target[3:], name) if target.startswith("re:") else target == name

