"""A pass of one's own, in one file: a function from a graph to the number of nodes it changed, run at every compile."""

import torch
from torch import fx, nn

import qpass
from qpass.lowering.pipeline import passes

seen = {"products": 0, "quantizations": 0}


@qpass.register_pass("fold_double_relu", before="expose_activation_quant")
def fold_double_relu(graph: fx.Graph) -> int:
    """relu(relu(x)) becomes relu(x). Returns the number folded."""
    folded = 0
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.relu.default and node.args[0].target is torch.ops.aten.relu.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            folded += 1
    seen["folded"] = folded
    return folded


@qpass.register_pass("count", before="lower_to_kernel")
def count(graph: fx.Graph) -> int:
    """Only looks: how many products there are, and how many activation quantizations they share. Changes nothing."""
    seen["products"] = sum("qpass" in str(node.target) for node in graph.nodes)
    seen["quantizations"] = sum(node.target is torch.ops.aten.round.default for node in graph.nodes)
    return 0


class Attention(nn.Module):
    """Three products with one input, as in every attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(torch.relu(x))
        return self.q(x) * self.k(x) + self.v(x)


print("pipeline:", " -> ".join(step.name for step in passes()))
torch.manual_seed(0)
x = torch.randn(4, 64)
model = qpass.quantize(Attention().eval(), "w8a8", example_inputs=x, progress=False)
# A compiled graph that is found in the cache runs no passes, and this file wants to see its own run each time.
afresh = torch.compile(model, options={"fx_graph_cache": False})
with torch.no_grad():
    eager, compiled = model(x), afresh(x)
torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)
print(f"double relus folded: {seen['folded']}")
print(f"just before lowering: {seen['products']} call multiplies, {seen['quantizations']} activation quantization")
assert seen == {"products": 1, "quantizations": 1, "folded": 1}, seen
print(qpass.explain(model))
