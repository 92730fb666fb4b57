"""Load: a checkpoint of any registered format in, a model with packed layers out, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qpass.checkpoints.checkpoint_layers import Contents, match_contents
from qpass.checkpoints.fill_model import fill_floats, fill_layers, read_float, tie_tables
from qpass.checkpoints.replan_layers import replan
from qpass.dtype import is_float, torch_dtype
from qpass.errors import CheckpointError, QPassError
from qpass.formats.checkpoint import Checkpoint, understood
from qpass.formats.format_registry import Format, open_checkpoint
from qpass.formats.lent_memory import LentMemory
from qpass.formats.reader import Reader
from qpass.recipes.recipe import Recipe
from qpass.recipes.recipe_files import as_recipe

if TYPE_CHECKING:
    from qpass.checkpoints.checkpoint_experts import ExpertsLayer
    from qpass.plan_model import Plan


def load(folder: str | PathLike[str], recipe: Any = None, device: torch.device | str | None = None,
         dtype: torch.dtype | None = None, *, model: nn.Module | None = None, allow_pickle: bool = False,
         exact: bool = False) -> nn.Module:
    """The model in `folder`: quantized as its checkpoint says, or, with a recipe, a float one quantized now.

    folder  of config.json and safetensors files, or a file, in any format of `qpass.formats` or of a package that
            registers one; `qpass inspect` says what it is
    recipe  anything that `quantize` takes: a float model is quantized with it; a quantized one keeps its integers and
            gets the recipe's activations ("w4a8" on any int4 checkpoint). None loads it as it is
    device  where the model should live, by default the CPU
    dtype   of parameters that stay float and of activations, by default what the checkpoint has
    model   a float model to fill, on any device; needed where the folder does not hold a Transformers model
    allow_pickle  read pickled files of formats that have no other, through torch.load(weights_only=True) alone
    exact   as of qpass.quantize: emulate the rounding of activations that this machine cannot compute with

    Integers, scales and zero points are taken over as they are, never rounded again. Names, shapes and dtypes are
    checked before memory is allocated; peak memory is the packed model and its largest tensor. No code from the folder
    is run. Raises CheckpointError, naming the file or the tensor.
    """
    where = torch.device("cpu" if device is None else device)
    if exact and recipe is not None:
        recipe = as_recipe(recipe).exactly()
    chosen, checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle)
    if chosen is None:
        return _load_float(checkpoint, recipe, where, dtype, model)
    return _load_packed(checkpoint, chosen, recipe, where, dtype, model, exact)


def _load_packed(checkpoint: Checkpoint, chosen: Format, recipe: Any, device: torch.device,
                 dtype: torch.dtype | None, model: nn.Module | None, exact: bool) -> nn.Module:
    from qpass.checkpoints.checkpoint_experts import fill_experts, find_experts
    from qpass.hf.model_config import empty_model
    from qpass.quantize_model import check_model, finish, quantize, remember

    with understood(checkpoint.path):
        reader = chosen.reader(checkpoint)
    if model is not None:
        check_model(model)
    elif chosen.empty_model is not None:
        model = chosen.empty_model(checkpoint)
    else:
        layers_said = checkpoint.config.get("num_hidden_layers")
        if isinstance(layers_said, int) and layers_said > len(checkpoint.tensors):
            raise CheckpointError(f"{checkpoint.path / 'config.json'}: num_hidden_layers is {layers_said}, and the "
                                  f"files have {len(checkpoint.tensors)} tensors")
        model = empty_model(checkpoint.path, checkpoint.config)
    with understood(checkpoint.path):
        experts: Sequence[ExpertsLayer] = find_experts(model, checkpoint, reader)
        contents = match_contents(model, checkpoint, reader, experts)
    packed = [layer for layer in experts if layer.blocks]
    plain = not contents.layers and not packed and not any(item.read and item.read.note for item in contents.floats)
    if recipe is not None and not plain:
        layers, experts, notes = replan(model, contents.layers, experts, recipe, str(checkpoint.path))
        contents = replace(contents, layers=tuple(layers), notes=(*contents.notes, *notes))
    exact = exact or (recipe is not None and as_recipe(recipe).on_unsupported_activation == "emulate")
    plan = plan_of(model, None if recipe is not None else reader, checkpoint.quantization, contents, experts,
                   exact=exact)
    # A table that reads a packed head's rows is in the files for others; here it would be a second copy.
    fill_floats([item for item in contents.floats if item.name not in reader.tied], checkpoint, device, dtype)
    fill_layers(model, contents.layers, checkpoint, device, dtype, exact=exact)
    fill_experts(model, experts, checkpoint, device, dtype)
    tie_tables(model, reader.tied, checkpoint.path)
    model.to(device)
    model.eval()
    if plain and recipe is not None:  # floats that their tool would round at load
        return quantize(model, recipe, progress=False)  # type: ignore[no-any-return]
    remember(model, plan)
    finish(model, plan)
    return model


def _load_float(checkpoint: Checkpoint, recipe: Any, device: torch.device, dtype: torch.dtype | None,
                model: nn.Module | None) -> nn.Module:
    from qpass.hf.model_config import load_float

    if recipe is not None and not as_recipe(recipe).algorithms:
        return _stream_float(checkpoint, as_recipe(recipe), device, dtype, model)
    if model is None:
        model = load_float(checkpoint.path, checkpoint.config)
    else:
        fill_floats(match_contents(model, checkpoint, None).floats, checkpoint, device)
    model.to(device=device, dtype=dtype)
    if recipe is not None:
        from qpass.quantize_model import quantize

        quantize(model, recipe, progress=False)
    return model.eval()


def _stream_float(checkpoint: Checkpoint, recipe: Recipe, device: torch.device, dtype: torch.dtype | None,
                  model: nn.Module | None) -> nn.Module:
    """Quantize each weight as it is read; in memory are the packed model and the largest tensor."""
    from qpass.checkpoints.stream_quantize import StreamQuantizer
    from qpass.hf.model_config import empty_model
    from qpass.plan_model import make_plan
    from qpass.quantize_model import check_model, finish, remember

    if model is None:
        model = empty_model(checkpoint.path, checkpoint.config)
        if dtype is None and not {"dtype", "torch_dtype"} & checkpoint.config.keys():
            dtype = next((torch_dtype(s.dtype) for s in checkpoint.tensors.values() if is_float(s.dtype)), None)
    check_model(model)
    contents = match_contents(model, checkpoint, None)
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_meta and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    plan = make_plan(model, recipe, device=device)
    stream, lent = StreamQuantizer(model, plan), LentMemory()
    for item in contents.floats:
        if not stream.wants(item.name):
            fill_floats([item], checkpoint, device, dtype)
        elif (weight := read_float(item, checkpoint, device, dtype, lent)) is not None:
            stream.take(item.name, weight)
            del weight
    del lent
    stream.finish()
    model.to(device)
    model.eval()
    remember(model, plan)
    finish(model, plan)
    return model


def plan_of(model: nn.Module, reader: Reader | None, quantization: Mapping[str, Any], contents: Contents,
            experts: Sequence[ExpertsLayer] = (), *, exact: bool = False) -> Plan:
    """What `explain` tells of each layer, planned anew on the empty model; only notes where that cannot be had."""
    from qpass.plan_model import Plan, make_plan

    asked = [dict(reader.recipe)] if reader is not None and reader.recipe else []
    if reader is not None and quantization.get("quant_method") == "compressed-tensors":
        asked.append(dict(quantization))
    made = _recipe(contents, experts)
    for recipe in (*asked, made):
        try:
            plan = make_plan(model, as_recipe(recipe).exactly() if exact else recipe)
        except QPassError:
            continue
        return replace(plan, notes=(*plan.notes, *contents.notes))
    packed = contents.layers or any(layer.blocks for layer in experts)
    none = () if packed else ("no weight of this checkpoint is packed",)
    return Plan(rows=(), decisions=(), recipe=made, capture_method="none", notes=(*none, *contents.notes))


def _recipe(contents: Contents, experts: Sequence[ExpertsLayer]) -> Recipe:
    """The recipe that would make these layers, each by its name."""
    from qpass.scheme import scheme_for

    packed = {path: layer.read.spec for layer in contents.layers for path in layer.paths}
    for layer in experts:
        for which, leaves in enumerate((layer.site.first, (layer.site.second,))):
            spec = next((parts[which] for parts, _ in layer.blocks if parts[which] is not None), None)
            packed |= {f"{layer.site.owner}.{leaf}": spec for leaf in leaves if spec is not None}
    return Recipe(None, ignore=(), overrides={path: scheme_for(spec.weight, spec.activation)
                                              for path, spec in packed.items()})
