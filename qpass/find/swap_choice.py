"""Swap choice: all products that read one parameter in; how that parameter can be swapped, or why it cannot, out."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, fx, nn

from qpass.capture.find_products import Product, scope_of, torch_call_of
from qpass.capture.walk import TURNS, is_view
from qpass.find.graph_facts import aten_name

Swap = Literal["module", "parameter"]

# What WeightView, which stands in for a swapped parameter, takes over (__torch_function__), and its ways to turn.
_TAKEN_OVER = ("linear", "matmul", "__matmul__", "mm", "addmm", "einsum")
_TURNED_BY = ("T", "numpy_T", "mT", "t", "transpose", "permute", "data", "detach", "contiguous")


class Calls:
    """The graph's nodes by the module call they ran in."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.inside: dict[Any, list[fx.Node]] = defaultdict(list)  # directly, not in a child
        self.nested: set[Any] = set()  # calls in which another module computes something
        self.returns_tensor: Mapping[Any, bool] = graph_module.meta.get("returns_tensor", {})
        for node in graph_module.graph.nodes:
            scope = scope_of(node)
            if scope:
                self.inside[scope[-1].call].append(node)
                self.nested.update(entry.call for entry in scope[:-1])


def choose_swap(name: str, products: Sequence[Product], owners: Mapping[str, nn.Module | None],
                calls: Calls) -> tuple[Swap | None, str | None]:
    """("module" | "parameter", None), or (None, the sentence that says why not and what to do).

    `owners`: path -> module, for every module that holds the parameter under one of its names.
    """
    if refusal := _not_the_weight_itself(name, products):
        return None, refusal
    kinds = {product.kind for product in products}
    if "embedding" in kinds and len(kinds) > 1:
        return ("module", None) if _is_head_of_table(name, products, owners, calls) else (None, (
            f"{name} is tied: it is looked up as an embedding and multiplied as a weight; to quantize the "
            "product alone, give it a parameter of its own (a clone) first, or add it to ignore"))
    if "experts" in kinds:
        return None, f"{name}: experts are replaced as a whole, by the module that computes them"
    if refusal := _read_by_others(name, products):
        return None, refusal
    if all(_is_whole_call(product, owners, calls) for product in products):
        return "module", None
    if "embedding" in kinds:
        return None, (f"{name} is looked up inside a bigger forward, where the look-up cannot be replaced alone; it "
                      "stays in float: add it to ignore")
    if len({product.transposed for product in products}) > 1:
        return None, (f"{name} is multiplied both as stored and transposed, and packed weights serve one way only; "
                      "give each product a parameter of its own, or add it to ignore")
    for product in products:
        if refusal := _not_taken_over(name, product):
            return None, refusal
    return "parameter", None


def derived_refusal(name: str, product: Product) -> str:
    """The sentence for a parameter that is computed with before it is multiplied."""
    ops = ", ".join(sorted({aten_name(_computing(node)) for node in product.node.all_input_nodes
                            if node is not product.activation and node.op == "call_function"})) or "other operations"
    if ".parametrizations." in name:
        owner, _, rest = name.partition(".parametrizations.")
        return (f"{name} goes through a parametrization before it is multiplied; call torch.nn.utils.parametrize."
                f"remove_parametrizations on {owner or 'the model'!r} for {rest.split('.')[0]!r} first, or ignore it")
    return (f"{name} is not multiplied as stored: the weight of the product is computed from it by {ops} at each call "
            "(a merge, a scale, a norm of the weight); store the result as the parameter first, or add it to ignore")


def _computing(node: fx.Node) -> fx.Node:
    """The node that computed the numbers of which `node` is a view."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _not_the_weight_itself(name: str, products: Sequence[Product]) -> str | None:
    for product in products:
        weight = product.weight
        if weight is None:
            return derived_refusal(name, product)
        if weight.cast is not None:
            return (f"{name} is cast to {_short(weight.cast)} at each call before it is multiplied; store it as "
                    f"{_short(weight.cast)} (model.to(...)) or remove the cast, or add it to ignore")
        if product.kind == "embedding":
            continue
        if weight.orientation == "part":
            return (f"{name}: a product reads only a part (a slice) of this parameter; split it into one parameter a "
                    "product, or add it to ignore")
        if weight.orientation == "reshaped":
            shape = list(weight.root.meta["val"].shape)
            return (f"{name} is stored as {shape} and reshaped to a matrix at each call; store it as a matrix [N, K], "
                    "or add it to ignore")
    return None


def _read_by_others(name: str, products: Sequence[Product]) -> str | None:
    ours = {product.node for product in products}
    steps = {step for product in products if product.weight for step in product.weight.steps}
    roots = {product.weight.root for product in products if product.weight}
    for node in roots | steps:
        for user in node.users:
            if user in ours or user in steps or (is_view(user) and not user.users):
                continue
            return (f"{name} is also read by {aten_name(user)}, not only multiplied, and a packed weight has no float "
                    "numbers to give; compute that once beforehand, or add it to ignore")
    return None


def _is_head_of_table(name: str, products: Sequence[Product], owners: Mapping[str, nn.Module | None],
                      calls: Calls) -> bool:
    """Whether `name` is the head's name of a parameter that modules multiply whole and nn.Embedding looks up: then the
    head can be packed, and the embedding reads its rows."""
    heads = [product for product in products if product.kind == "linear"]
    tables = [owners.get(p.scope[-1].path) if p.scope else None for p in products if p.kind == "embedding"]
    paths = {product.scope[-1].path for product in heads if product.scope}
    return (len(heads) + len(tables) == len(products) and name.rpartition(".")[0] in paths
            and all(isinstance(table, nn.Embedding) and table.max_norm is None for table in tables)
            and all(not product.transposed and _is_whole_call(product, owners, calls) for product in heads)
            and _read_by_others(name, products) is None)


def _is_whole_call(product: Product, owners: Mapping[str, nn.Module | None], calls: Calls) -> bool:
    """Whether the product is all that a call of its owner does: owner(x) == product(x) + bias, for any x."""
    if not product.scope or product.scope[-1].path not in owners:
        return False
    call, owner = product.scope[-1].call, owners[product.scope[-1].path]
    if call in calls.nested or product.node not in calls.inside[call]:
        return False
    if product.kind == "linear" and not _takes_one_tensor(owner, calls.returns_tensor.get(call)):
        return False
    nodes = calls.inside[call]
    within = set(nodes)
    weight_steps = set(product.weight.steps) if product.weight else set()
    for node in nodes:
        if node in weight_steps or node is product.node or node is product.result:
            continue
        if not is_view(node) or node.target in TURNS or not _keeps_all(node):
            return False
    sources = {source for node in nodes for source in node.all_input_nodes if source not in within}
    given = [source for source in sources if source.op != "get_attr" or source.target not in _held(product)]
    leaving = [node for node in nodes if any(user not in within for user in node.users)]
    if product.kind == "embedding":
        return len(nodes) == 1
    if len(given) != 1 or len(leaving) > 1:
        return False
    if not leaving:
        return True
    x, y = given[0].meta["val"], leaving[0].meta["val"]
    return bool(y.shape == (*x.shape[:-1], y.shape[-1]) and y.dtype == x.dtype)


def _held(product: Product) -> tuple[Any, ...]:
    assert product.weight is not None
    return product.weight.name, product.bias


def _takes_one_tensor(owner: nn.Module | None, returns_tensor: bool | None) -> bool:
    if isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward:
        return True
    if owner is None or returns_tensor is None:
        return owner is None  # an ExportedProgram has no modules left to ask
    try:
        parameters = inspect.signature(owner.forward).parameters
    except (TypeError, ValueError):
        return False
    return returns_tensor and len(parameters) == 1


def _keeps_all(node: fx.Node) -> bool:
    source = node.args[0]
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    after = node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.numel() == after.numel()


def _not_taken_over(name: str, product: Product) -> str | None:
    """A sentence unless an object in the parameter's place would get to take the product over."""
    assert product.weight is not None
    call = torch_call_of(product.node)
    function = function_name(call.function) if call else "an unknown function"
    if call is None or function not in _TAKEN_OVER:
        return (f"{name} is multiplied inside {function}, which runs as one piece and cannot be opened; call "
                "torch.nn.functional.linear there instead, or add it to ignore")
    for step in product.weight.steps:
        step_call = torch_call_of(step)
        if _called_by(step) == call.call:
            continue
        by = function_name(step_call.function) if step_call else "an unknown function"
        if by not in _TURNED_BY or step.meta["val"].ndim != 2:
            return (f"{name} goes through {by} before it is multiplied, which packed weights do not support; "
                    "multiply by the parameter or its transpose directly, or add it to ignore")
    if function == "einsum":
        equation = call.args[0] if call.args and isinstance(call.args[0], str) else None
        if not _einsum_is_linear(equation):
            return (f"{name} is multiplied by einsum({equation!r}), which is no plain product x @ w; contract the "
                    "last index of the activation and keep the others in order, or add it to ignore")
        return None
    steps_before = [step for step in product.weight.steps if _called_by(step) != call.call]
    given = steps_before[-1] if steps_before else product.weight.root
    place = {"linear": 1, "addmm": 2}.get(function, 1)
    as_keyword = function == "linear" and call.kwargs.get("weight") is given
    if not as_keyword and (len(call.args) <= place or call.args[place] is not given):
        return (f"{name} is the left operand of its product, W @ x; packed weights multiply from the right: write "
                "x @ W.T, or add it to ignore")
    if function == "addmm" and product.node.kwargs:
        return f"{name} is multiplied by addmm with alpha or beta; write them as separate steps, or add it to ignore"
    return None


def _called_by(node: fx.Node) -> int | str | None:
    call = torch_call_of(node)
    return call.call if call is not None else None


def function_name(function: Any) -> str:
    """`linear` for F.linear, `T` for the getter of Tensor.T."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__name__", str(function))
    return str(getattr(function.__self__, "__name__", name)) if name == "__get__" else str(name).split(".")[0]


def _einsum_is_linear(equation: str | None) -> bool:
    """Whether einsum(equation) is x[..., k] with w[k, n] or w[n, k] giving y[..., n], operands in either order."""
    if equation is None:
        return False
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2:
        return False
    for w, x in (terms, terms[::-1]):
        if len(w) == 2 and w.isalpha() and x and x[-1] in w:
            n = w.replace(x[-1], "", 1)
            if n not in x and out == x[:-1] + n:
                return True
    return False


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
