"""Module places: shared modules and tied parameters, in the order that `modules()` has."""

from torch import nn

from qpass.swap.module_places import holders, put_everywhere


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = first, second, None


def test_a_module_under_several_names_is_replaced_under_each() -> None:
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    inner = Two(shared, other)
    model = Two(inner, nn.Sequential(shared, inner))  # inner stands twice, too
    new = nn.Identity()
    put_everywhere(model, shared, new)
    assert model.first.first is new and model.second[0] is new and model.first.second is other
    assert shared not in set(model.modules())


def test_holders_come_in_the_order_of_modules() -> None:
    layers = [nn.Linear(2, 2, bias=False) for _ in range(4)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    model = nn.Sequential(layers[2], Two(layers[1], nn.Sequential(layers[3])), layers[0])
    found = holders(model, layers[0].weight)
    assert found == [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(found) == 4


def test_what_is_not_there_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = list(model.modules())
    put_everywhere(model, nn.Linear(2, 2), nn.Identity())
    assert list(model.modules()) == before and holders(model, nn.Parameter(model[0].weight.detach())) == []
