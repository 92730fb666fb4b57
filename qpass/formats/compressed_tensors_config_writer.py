"""compressed-tensors config writer: a model's packed layers in, the `quantization_config` of its config.json out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from qpass.codecs.microscaling import GROUP
from qpass.formats.compressed_tensors import is_packed
from qpass.formats.compressed_tensors_config import METHOD, STRATEGY
from qpass.formats.compressed_tensors_experts import Member, float_experts, members_of_experts
from qpass.formats.compressed_tensors_floats import FLOAT_FORMATS, float_fields
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.layers.reordered_linear import ReorderedLinear
from qpass.layers.tied_table import TiedTable
from qpass.scheme import ActivationArgs, WeightArgs, codec_of
from qpass.spec import LinearSpec


def write_config(model: nn.Module, recipe: Mapping[str, Any] | None = None,
                 asked: Mapping[str, ActivationArgs] = MappingProxyType({})) -> dict[str, Any] | None:
    """The `quantization_config` of a model that holds packed layers, as plain data; None if it holds none.

    A single group of nn.Linear layers is written by class and `ignore`, as LLM Compressor does; anything else by name.
    `asked` says, by a weight's name, what its activations should be rounded to where this machine leaves them in float:
    another one, which reads the file, may not.

    Packed integers of experts are said to have float activations: vLLM reads W4A8 experts only as one integer a byte.

    Under the key `qpass`, which other readers pass over, stand the recipe, how layers that are no nn.Linear store their
    weight, and what the activations of experts are rounded to.
    """
    layers = [(name, module) for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, PackedWeight) and not isinstance(module, TiedTable)]
    experts = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantExperts)]
    if not layers and not experts:
        return None
    members: dict[tuple[WeightArgs, ActivationArgs | None, bool, bool], list[Member]] = {}
    for name, layer in layers:
        ordered = getattr(layer, "input_order", None) is not None
        leaf = f".{layer.origin.weight}" if isinstance(layer, QuantLinear) else ""
        activation = layer.spec.activation or asked.get(f"{name}{leaf}")
        scaled = getattr(layer, "pre_scale", None) is not None
        members.setdefault((layer.spec.weight, activation, ordered, scaled), []).append(
            Member(target=name, spec=layer.spec, linear=_was_linear(layer)))
    rounded: dict[str, dict[str, Any]] = {}
    for name, module in experts:
        for member in members_of_experts(name, module):
            activation = member.spec.activation or asked.get(f"{name}.{member.leaf}")
            if activation is not None and is_packed(member.spec) and codec_of(member.spec.weight) is None:
                rounded[member.target], activation = _activations(activation), None
            members.setdefault((member.spec.weight, activation, False, False), []).append(member)
    groups: dict[str, Any] = {}
    ignore: list[str] = []
    for number, ((weight, activation, ordered, scaled), named) in enumerate(members.items()):
        targets = [member.target for member in named]
        if len(members) == 1:
            rest = [member.target for member in named if not member.linear]
            if len(rest) < len(targets):
                targets = ["Linear", *rest]
                ignore = [name for name, module in model.named_modules(remove_duplicate=False)
                          if isinstance(module, nn.Linear) or _is_float_matrix(module)]
                ignore += [target for name, module in experts for target in float_experts(name, module)]
        groups[f"group_{number}"] = {
            # Whoever does not know that inputs are scaled must not read it, and be wrong.
            "targets": targets, "format": "qpass" if scaled else _format_of(named[0].spec),
            "weights": {**_weights(weight), "actorder": "group" if ordered else None},
            "input_activations": None if activation is None else _activations(activation), "output_activations": None}
    formats = {group["format"] for group in groups.values()}
    own = {"experts": rounded, "recipe": None if recipe is None else dict(recipe),
           "layers": {name: _storage(layer) for name, layer in layers if not _was_linear(layer)},
           "tied": _tied(model, layers)}
    transforms = write_transforms(model)
    more = {} if transforms is None else {"transform_config": transforms}
    return {**more, "quant_method": METHOD, "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None,
            "global_compression_ratio": None, "qpass": own}


def write_transforms(model: nn.Module) -> dict[str, Any] | None:
    """The `transform_config` of a model; None if none of its layers mixes its input."""
    by_size: dict[int, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, ReorderedLinear) and layer.hadamard is not None:
            by_size.setdefault(layer.hadamard, []).append(name)
    groups = {("R4" if len(by_size) == 1 else f"R4_{size}"): {
        "type": "hadamard", "randomize": False, "requires_grad": False, "head_dim": size, "precision": "torch.float32",
        "apply": [{"targets": names, "location": "input", "inverse": False, "ignore": []},
                  {"targets": names, "location": "weight_input", "inverse": True, "ignore": []}]}
        for size, names in by_size.items()}
    return {"config_groups": groups} if groups else None


def _tied(model: nn.Module, layers: Sequence[tuple[str, PackedWeight]]) -> dict[str, str]:
    """Tables of embeddings that read the rows of a packed head -> the head."""
    heads = {id(layer._buffers): name for name, layer in layers}
    return {name: heads[id(module._buffers)] for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, TiedTable)}


def _is_float_matrix(module: nn.Module) -> bool:
    """Whether other readers may have an nn.Linear where this has a class of its own, as with routers of experts."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _weights(args: WeightArgs) -> dict[str, Any]:
    if args.type in FLOAT_FORMATS:
        return float_fields(args)
    return {"num_bits": args.bits, "type": args.type, "symmetric": args.symmetric, "dynamic": False, "actorder": None,
            "strategy": STRATEGY[args.granularity], "group_size": args.group_size}


def _activations(args: ActivationArgs) -> dict[str, Any]:
    if args.type == "float":  # without it, groups of 32 are not those of MX but have scales in the model's dtype
        nested = "torch.float8_e4m3fn" if args.dynamic == "local" else None
        scale = {"scale_dtype": "torch.uint8" if args.group_size == GROUP else nested}
    else:
        scale = {}
    return {**scale, "num_bits": args.bits, "type": args.type, "symmetric": args.symmetric, "dynamic": args.dynamic,
            "actorder": None, "group_size": args.group_size, "observer": None,
            "strategy": "tensor_group" if args.dynamic == "local" else STRATEGY[args.granularity]}


def _format_of(spec: LinearSpec) -> str:
    if codec_of(spec.weight) is not None:
        return FLOAT_FORMATS.get(spec.weight.type, "qpass")
    return "pack-quantized" if is_packed(spec) else "int-quantized"


def _storage(layer: PackedWeight) -> dict[str, Any]:
    if isinstance(layer, QuantLinear):
        return {"weight": layer.origin.weight, "bias": layer.origin.bias, "transposed": layer.origin.transposed}
    return {"weight": None, "bias": None, "transposed": getattr(layer, "transposed", False)}


def _was_linear(layer: PackedWeight) -> bool:
    return isinstance(layer, QuantLinear) and isinstance(layer.origin.module, nn.Linear) and not layer.origin.transposed
