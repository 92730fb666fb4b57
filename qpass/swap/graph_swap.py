"""Graph swap: a GraphModule or ExportedProgram in, the same object out, its products rewritten to quantized ones.

Every product that reads a chosen parameter becomes one node: `call_module` of a QuantWeight in a GraphModule,
`qpass::linear` on buffers in an ExportedProgram, which has no modules.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from qpass.calibrate.static_activation import static_scales
from qpass.decide.decision import Decision
from qpass.errors import AlreadyQuantized, LayerRefused
from qpass.layers.quant_weight import QuantWeight
from qpass.plan_model import Plan, make_plan
from qpass.recipes.recipe import Recipe
from qpass.weight import check_weight, quantize_weight

aten = torch.ops.aten
_LINEARS = {F.linear, aten.linear.default}
_MATMULS = {torch.matmul, torch.mm, torch.bmm, operator.matmul, aten.matmul.default, aten.mm.default}
_ADDMMS = {torch.addmm, aten.addmm.default}
_TURNS = {aten.t.default, aten.numpy_T.default, torch.t, "t"}
_PERMUTES = {aten.transpose.int, aten.permute.default, torch.transpose, torch.permute, torch.swapaxes, "transpose",
             "permute"}


def quantize_graph(model: fx.GraphModule | ExportedProgram, recipe: Recipe, *, example_inputs: Any = None,
                   allow_nonfinite: bool = False) -> fx.GraphModule | ExportedProgram:
    """Quantize the graph in place by `recipe`; returns the same object. Raises before anything is changed."""
    if isinstance(model, ExportedProgram) and (done := model.graph_module.meta.get("qpass_packed")):
        raise AlreadyQuantized(f"{len(done)} products of this program are quantized by qpass already, the first is of "
                               f"{next(iter(done))}; export the float model again")
    plan = make_plan(model, recipe, example_inputs=example_inputs)
    targets = [d for d in plan.decisions if d.status == "quantize" and d.site.kind != "embedding"]
    static_scales(model, targets, None)
    weights = {d.site.name: _parameter(model, d.site.name) for d in targets}
    products: dict[str, list[fx.Node]] = {}
    problems = []
    for decision in targets:
        name = decision.site.name
        check_weight(weights[name], name, allow_nonfinite=allow_nonfinite)
        try:
            products[name] = list(_products(model, decision))
        except LayerRefused as error:
            problems.append(str(error))
    if problems:
        raise LayerRefused("these products cannot be rewritten in the graph given:\n  " + "\n  ".join(problems))
    for decision in targets:
        packed = _pack(decision, weights.pop(decision.site.name))
        _remember(model, plan, decision.site.name, packed)
        if isinstance(model, ExportedProgram):
            _rewrite_program(model, decision, products[decision.site.name], packed)
        else:
            _rewrite_module(model, decision, products[decision.site.name], packed)
    _tidy(model)
    from qpass.lowering.install import install

    install()
    return model


def _parameter(model: fx.GraphModule | ExportedProgram, name: str) -> Tensor:
    return model.state_dict[name] if isinstance(model, ExportedProgram) else model.get_parameter(name)


def _pack(decision: Decision, weight: Tensor) -> QuantWeight:
    site, spec = decision.site, decision.spec
    assert spec is not None, f"{site.name} is to be quantized and has no spec"
    stored = weight.detach()
    canonical = quantize_weight(stored.t() if site.transposed else stored, spec)
    return QuantWeight(canonical, spec, site.dtype, transposed=site.transposed)


def _weight_nodes(model: fx.GraphModule | ExportedProgram, decision: Decision) -> list[fx.Node]:
    names = (decision.site.name, *decision.site.aliases)
    if isinstance(model, ExportedProgram):
        inputs = model.graph_signature.inputs_to_parameters
        return [n for n in model.graph.nodes if n.op == "placeholder" and inputs.get(n.name) in names]
    return [n for n in model.graph.nodes if n.op == "get_attr" and n.target in names]


def _products(model: fx.GraphModule | ExportedProgram, decision: Decision) -> Iterator[fx.Node]:
    """The nodes that multiply by the parameter. Raises LayerRefused at one that cannot be rewritten."""
    pending = [(node, decision.site.transposed) for node in _weight_nodes(model, decision)]
    while pending:
        node, in_out = pending.pop()  # in_out: the node's value stands [K, N], as `x @ value` needs it
        for user in list(node.users):
            if user.target in _TURNS or user.target in _PERMUTES or _is_t(user):
                pending.append((user, not in_out))
            elif _weight_operand(user) is node and in_out == (user.target not in _LINEARS):
                yield user
            else:
                name = decision.site.name
                raise LayerRefused(f"{name}: the graph gives it to {user.format_node()}, which is no product that can "
                                   f"be rewritten; add {name!r} to ignore")


def _is_t(node: fx.Node) -> bool:
    return node.target is getattr and len(node.args) == 2 and node.args[1] in ("T", "mT")


def _weight_operand(node: fx.Node) -> Any:
    if node.target in _LINEARS or node.target in _MATMULS:
        return node.args[1]
    return node.args[2] if node.target in _ADDMMS and not node.kwargs else None


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """(x, bias) of a product; read when it is rewritten, for the product before it may just have been replaced."""
    if node.target in _ADDMMS:
        return node.args[1], node.args[0]
    if node.target in _LINEARS:
        return node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return node.args[0], None


def _rewrite_module(model: fx.GraphModule, decision: Decision, products: list[fx.Node], packed: QuantWeight) -> None:
    name = decision.site.name
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    del owner._parameters[leaf]
    owner.add_module(leaf, packed)
    for product in products:
        with model.graph.inserting_before(product):
            call = model.graph.call_module(name, _operands(product))
        call.meta = dict(product.meta)
        product.replace_all_uses_with(call)
        model.graph.erase_node(product)


def _rewrite_program(program: ExportedProgram, decision: Decision, products: list[fx.Node],
                     packed: QuantWeight) -> None:
    (old,) = _weight_nodes(program, decision)
    signature = program.graph_signature
    position = next(i for i, spec in enumerate(signature.input_specs) if getattr(spec.arg, "name", None) == old.name)
    buffers, specs = [], []
    for tensor, value in zip(packed._names, packed.packed, strict=True):
        target = f"{decision.site.name}_{tensor}"
        with program.graph.inserting_before(old):
            node = program.graph.placeholder("b_" + target.replace(".", "_"))
        node.meta["val"] = old.meta["val"].fake_mode.from_tensor(value, static_shapes=True)
        buffers.append(node)
        specs.append(InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target, persistent=True))
        program.state_dict[target] = value
    for product in products:
        x, bias = _operands(product)
        with program.graph.inserting_before(product):
            call = program.graph.call_function(torch.ops.qpass.linear.default, (x, buffers, bias, str(packed.spec)))
        call.meta = dict(product.meta)
        product.replace_all_uses_with(call)
        signature.replace_all_uses(product.name, call.name)
        program.graph.erase_node(product)
    _erase_unused(program.graph, old)
    signature.input_specs[position:position + 1] = specs
    del program.state_dict[decision.site.name]


def _erase_unused(graph: fx.Graph, weight: fx.Node) -> None:
    """Take out what only turned the weight, and then the weight."""
    for user in list(weight.users):
        _erase_unused(graph, user)
    graph.erase_node(weight)


def _remember(model: fx.GraphModule | ExportedProgram, plan: Plan, name: str, packed: QuantWeight) -> None:
    if isinstance(model, ExportedProgram):
        meta = model.graph_module.meta
        meta.setdefault("qpass_packed", {})[name] = (packed.spec, packed.nbytes)
        meta["qpass_plan"] = plan
    else:
        model.__dict__["_qpass_plan"] = plan


def _tidy(model: fx.GraphModule | ExportedProgram) -> None:
    graph_module = model.graph_module if isinstance(model, ExportedProgram) else model
    if not isinstance(model, ExportedProgram):
        graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()


def float_graph(model: fx.GraphModule) -> None:
    """Turn calls of packed weights back into linears on float parameters; `swap.restore` makes the parameters."""
    for node in list(model.graph.nodes):
        packed = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(packed, QuantWeight):
            continue
        x, bias = node.args
        with model.graph.inserting_before(node):
            weight: Any = model.graph.get_attr(node.target)
            if packed.transposed:
                weight = model.graph.call_function(aten.t.default, (weight,))
            linear = model.graph.call_function(aten.linear.default, (x, weight, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        model.graph.erase_node(node)
    model.recompile()


def is_plain_graph(model: Any) -> bool:
    """Whether `model` is rewritten here: a program, or a GraphModule whose graph itself holds every product."""
    if isinstance(model, ExportedProgram):
        return True
    if not isinstance(model, fx.GraphModule):
        return False
    called = [model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module"]
    return not any(p.dim() >= 2 for module in called for p in module.parameters())
