"""Quantize: a model and a recipe in, the same model object out, its chosen layers packed; and the way back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpass.activation_scale import ActivationScale
from qpass.calibrate.experts import ExpertWeights
from qpass.calibrate.prepare import Preparation, Prepared, check_data
from qpass.calibrate.run import Limits
from qpass.calibrate.static_activation import static_scales
from qpass.capture.capture_model import capture
from qpass.errors import AlreadyCompiled, AlreadyQuantized, QPassError, RecipeError, WeightError
from qpass.input_change import InputChange
from qpass.kernels.registry import KERNELS, kernel
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer
from qpass.layers.refuse_training import allow_training, refuse_training
from qpass.plan_model import Decision, Plan, make_plan, plan_captured
from qpass.recipes.recipe_files import as_recipe
from qpass.swap.graph_swap import float_graph, is_plain_graph, quantize_graph
from qpass.swap.round_weight import known_finite
from qpass.swap.shared_scales import SharedScales
from qpass.swap.swap_experts import swap_experts
from qpass.swap.swap_site import TRIM_AFTER, give_back_freed_memory, restore, share_scales, swap_site
from qpass.weight import CanonicalWeight, check_weight


def quantize(model: Any, recipe: Any = "w4a8", *, example_inputs: Any = None, calibration: Iterable[Any] | None = None,
             tokenizer: Any = None, num_samples: int = 128, max_seq_length: int = 512, seed: int = 0,
             work_folder: str | os.PathLike[str] | None = None, memory_limit: int | None = None,
             device: torch.device | str | None = None, progress: bool = True, allow_nonfinite: bool = False,
             exact: bool = False) -> Any:
    """Quantize `model` in place by `recipe` and return the same object.

    model           an nn.Module (of any class; it stays that class), a torch.fx.GraphModule, or an ExportedProgram
    recipe          a preset name, Scheme, Recipe, dict, torchao config, or path to a YAML or JSON recipe
    example_inputs  what one call of the model takes: a tensor, a tuple of positional or a dict of keyword arguments;
                    by default the model's own `dummy_inputs`. Only shapes and dtypes are used.
    calibration     data for the recipe's algorithms and for static activation scales: an iterable of model inputs
                    (each as `example_inputs`), a list of texts, or the path of a text file (or a list of paths); at
                    most `num_samples` samples of `max_seq_length` tokens are used. Tokens that an `attention_mask`
                    hides do not count for the algorithms
    tokenizer       for texts: a tokenizer or its path, by default that of the folder the model was loaded from
    seed            of whatever an algorithm draws at random; equal calls give equal models
    work_folder     keeps what calibration has done, so that the same call goes on after an interruption
    memory_limit    bytes of activations in memory during calibration; what is beyond lies in files
    device          where the quantized model should live; by default each layer stays where it is
    progress        show a bar on stderr
    allow_nonfinite quantize NaN and Inf in weights as 0 instead of refusing
    exact           where this machine cannot compute with what a float scheme rounds activations to, round them all the
                    same and multiply in float32, as the recipe's on_unsupported_activation="emulate" says; by default
                    they stay in the model's dtype, and the report says why

    Peak memory is the model plus one layer. Interrupted (Ctrl-C), the model is left with each layer whole: either
    still float or packed. Raises a subclass of QPassError that names the layer before anything is changed.
    """
    chosen = as_recipe(recipe).exactly() if exact else as_recipe(recipe)
    check_data(chosen.algorithms, calibration is not None)
    where = None if device is None else _usable(device)
    if is_plain_graph(model):
        if chosen.algorithms:
            names = ", ".join(algorithm.name for algorithm in chosen.algorithms)
            raise RecipeError(f"{names} works on the modules of a model, and a {type(model).__name__} has none; "
                              "quantize the nn.Module it was made from")
        if where is not None and not isinstance(model, nn.Module):
            raise TypeError("an ExportedProgram stays on the device that it was exported on; quantize it without "
                            "`device`, or export the model on the other one")
        if calibration is not None:
            raise RecipeError("calibration data needs an nn.Module, whose layers can be watched; quantize the module, "
                              "and export or trace it then")
        quantize_graph(model, chosen, example_inputs=example_inputs, allow_nonfinite=allow_nonfinite)
        return model if where is None else model.to(where)
    check_model(model)
    captured = capture(model, example_inputs)
    plan = plan_captured(model, captured, chosen, where)
    targets = [d for d in plan.decisions if d.status == "quantize" and d.site.kind != "embedding"]
    _check_weights(model, targets, allow_nonfinite)
    preparation = Preparation(model=model, plan=plan, captured=captured, example_inputs=example_inputs,
                              data=calibration, tokenizer=tokenizer, num_samples=num_samples,
                              max_seq_length=max_seq_length,
                              limits=Limits(work_folder=None if work_folder is None else Path(work_folder),
                                            memory_limit=memory_limit, seed=seed))
    prepared = preparation.prepare() if chosen.algorithms else None
    if prepared is not None and prepared.notes:
        plan = make_plan(model, chosen, example_inputs=example_inputs, device=where)
        plan = replace(plan, notes=(*plan.notes, *prepared.notes))
    scales = {} if chosen.algorithms else static_scales(model, targets, preparation.inputs())
    remember(model, plan)
    try:
        if prepared is not None:
            plan = replace(plan, notes=(*plan.notes, *_calibrate_all(model, plan, targets, prepared, where, progress)))
            remember(model, plan)
        else:
            _swap_all(model, targets, plan.decisions, where, progress, scales)
    except BaseException:
        # What was reached is packed and must save, explain and refuse to train as such.
        if any(isinstance(module, PackedLayer) for module in model.modules()):
            finish(model, plan)
        else:
            model.__dict__.pop("_qpass_plan", None)
        raise
    if where is not None:
        model.to(where)
    finish(model, plan)
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Put ordinary float modules back, holding the weights as quantized, in place; returns the same object.

    Raises QPassError if nothing in the model is quantized.
    """
    if isinstance(model, torch.fx.GraphModule):
        float_graph(model)
    if restore(model) == 0:
        raise QPassError("nothing in this model is quantized by qpass; quantize it first")
    from qpass.hf.model_config import forget_config

    forget_config(model)
    allow_training(model)
    model.__dict__.pop("_qpass_plan", None)
    return model


def check_model(model: Any) -> None:
    """Raise unless `model` is a float nn.Module that is neither quantized nor compiled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize takes an nn.Module, GraphModule or ExportedProgram, got {type(model).__name__}")
    compiled = [name for name, module in model.named_modules()
                if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None]
    if compiled:
        raise AlreadyCompiled(f"{compiled[0] or 'this model'} is compiled already; quantize the model first and "
                              "compile the result: model = torch.compile(qpass.quantize(model, recipe))")
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]
    if packed:
        raise AlreadyQuantized(f"{len(packed)} layers are quantized by qpass already, the first is {packed[0]}; "
                               "qpass.dequantize(model) goes back, or load the float model again")
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(getattr(model, "config", None), "quantization_config", None)
        raise AlreadyQuantized(f"Transformers quantized this model already ({type(method).__name__}); load the float "
                               "checkpoint instead, or this one as it is: from_pretrained(path, "
                               "quantization_config=qpass.QPassConfig())")


def remember(model: nn.Module, plan: Plan) -> None:
    """Keep the plan on the model, for `explain`; not a parameter, not in state_dict."""
    model.__dict__["_qpass_plan"] = plan


def finish(model: nn.Module, plan: Plan | None) -> None:
    """What follows the last swap: Transformers' config is told, and torch.compile gets the lowering passes."""
    from qpass.hf.model_config import write_config
    from qpass.lowering.install import install

    share_scales(model)
    write_config(model, plan)
    refuse_training(model)
    install()


def _usable(device: torch.device | str) -> torch.device:
    """The device, if weights can live there; WeightError before anything is moved."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise WeightError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}. Without `device` each "
                          "layer stays where it is; nothing was changed") from error
    if where.type == "meta":
        raise WeightError("device='meta' holds no numbers; qpass.plan needs none, and quantize needs a real device")
    return where


def _check_weights(model: nn.Module, targets: list[Decision], allow_nonfinite: bool) -> None:
    devices: dict[str, str] = {}
    for decision in targets:
        weight = model.get_parameter(decision.site.name)
        devices.setdefault(str(weight.device), decision.site.name)
        known = decision.spec is not None and known_finite(weight, decision.spec)
        check_weight(weight, decision.site.name, allow_nonfinite=allow_nonfinite or known)
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        places = "; ".join(f"{name} is on {device}" for device, name in devices.items())
        raise WeightError(f"the model's weights are on {len(devices)} devices ({places}); move it to one with "
                          "model.to(device), or load it with a device_map")


def _prepare_kernels(targets: list[Decision], bar: Any) -> None:
    """Build what has to be built once on this machine, and say so: it is the only long silence of a first run."""
    names = {name for d in targets if d.spec is not None for name in (d.spec.kernel, d.kernel) if name in KERNELS}
    ways = {made.prepare for name in names if (made := kernel(name)).prepare is not None}
    if ways:
        bar.set_postfix_str("making the kernels ready: built once on a machine, 5 to 10 s")
    for prepare in ways:
        prepare()


def _swap_all(model: nn.Module, targets: list[Decision], plan: Sequence[Decision], device: torch.device | None,
              progress: bool, scales: Mapping[str, ActivationScale]) -> None:
    from tqdm import tqdm

    with tqdm(total=len(targets), desc="quantizing", unit="layer", disable=not progress) as bar:
        _prepare_kernels(targets, bar)
        install = _Installer(model, plan, device, len(targets), bar)
        with install:
            for decision in targets:
                bar.set_postfix_str(decision.site.name, refresh=False)
                install(decision, None, scales.get(decision.site.name))


def _calibrate_all(model: nn.Module, plan: Plan, targets: list[Decision], run: Prepared, device: torch.device | None,
                   progress: bool) -> list[str]:
    from tqdm import tqdm

    started = time.perf_counter()
    with tqdm(total=len(targets), desc="calibrating", unit="layer", disable=not progress) as bar:
        _prepare_kernels(targets, bar)
        with _Installer(model, plan.decisions, device, len(targets), bar) as install:
            notes = run(install, bar)
            experts = [d for d in targets if d.site.experts is not None and d.site.name not in install.calibrated]
            for decision in experts:
                install(decision, None)
    if experts:
        notes = [*notes, f"{len(experts)} weights of experts are rounded to nearest; of the algorithms, gptq alone "
                         "calibrates experts, and integers on scales of rows or groups only"]
    return [f"{run.told}, in {time.perf_counter() - started:.1f} s", *notes]


class _Installer:
    """Swaps one site after another, gives memory back, and says how far it got if the block is left by an exception."""

    def __init__(self, model: nn.Module, plan: Sequence[Decision], device: torch.device | None, total: int,
                 bar: Any) -> None:
        self.model, self.plan, self.device, self.total, self.bar = model, plan, device, total, bar
        self.done = self.freed = 0
        self.calibrated: set[str] = set()
        self.shared = SharedScales(model, plan)

    def __call__(self, decision: Decision, canonical: CanonicalWeight | None, scale: ActivationScale | None = None,
                 experts: ExpertWeights | None = None, change: InputChange | None = None) -> None:
        if experts:
            self.calibrated.add(decision.site.name)
        if decision.site.experts is None:
            swap_site(self.model, decision, self.device, scale, canonical, self.shared.largest(decision),
                      change)
        elif not isinstance(self.model.get_submodule(decision.site.owner), QuantExperts):
            swap_experts(self.model, [d for d in self.plan if d.site.experts == decision.site.experts], self.device,
                         experts)
        self.freed += decision.site.numel * decision.site.dtype.itemsize
        if self.freed >= TRIM_AFTER:
            give_back_freed_memory()
            self.freed = 0
        self.done += 1
        self.bar.update()

    def __enter__(self) -> _Installer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"qpass: interrupted after {self.done} of {self.total} layers; each layer is whole, either "
                           "packed or float. qpass.dequantize(model) makes all of them float again.")
