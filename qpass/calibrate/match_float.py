"""Match float: a block's calls in the float and in the quantized model in; what each site's output lacks, out.

A site that is rounded for itself reproduces its float product on inputs that earlier layers have already changed, and
every error before it stays. Here its target is what the float model computes at that place: its output there or, where
that is added to another tensor (a residual stream), the sum. The difference E [T, N] is regressed on the quantized
model's input x, as `correction_math` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.calibrate.activation_store import ActivationStore
from qpass.calibrate.block_work import BlockWork, SiteWork, counted_rows
from qpass.calibrate.correction_math import Halves, confirmed_changes
from qpass.calibrate.hessian import Hessian
from qpass.measure.watch_products import SeenProduct, WatchProducts

_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class WatchSums(WatchProducts):
    """A context in which `see_input(name, x)` is told of each product's input, before it is computed, and
    `see_sum(name, sum)` of the sum of a product and a tensor of its size."""

    def __init__(self, weights: Mapping[str, Tensor], see_input: Callable[[str, Tensor], None],
                 see_sum: Callable[[str, Tensor], None]) -> None:
        super().__init__(weights, self._product, see_input)
        self._see_sum = see_sum
        self._waiting: dict[str, Tensor] = {}

    def _product(self, name: str, product: SeenProduct) -> None:
        self._waiting[name] = product.output

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _ADDS and not kwargs and all(isinstance(part, Tensor) for part in args[:2]):
            for name, product in list(self._waiting.items()):
                for mine, other in (args[:2], args[1::-1]):
                    if mine.untyped_storage().data_ptr() != product.untyped_storage().data_ptr() or (
                            mine.numel() != product.numel()):
                        continue
                    if other.numel() < mine.numel():
                        self._waiting[name] = output  # a bias
                    else:
                        del self._waiting[name]
                        self._see_sum(name, output)
                    break
        return output


class _Enough(Exception):
    pass


def float_side(work: BlockWork, groups: Sequence[Sequence[SiteWork]]) -> ActivationStore:
    """What the float model's inputs give at every group and sum of the block, a dict by key for each sample.

    Run before anything of the block is rounded; fills the block's targets on the way.
    """
    assert work.float_calls is not None and work.targets is not None
    missing = not len(work.targets)
    found = ActivationStore(work.calls.budget)
    sites = [site for group in groups for site in group]
    firsts = {group[0].name for group in groups}
    for number, mask in enumerate(work.masks):
        work.tell(f"float {number + 1} of {len(work.calls)} samples")
        seen, output = _one_run(work, sites, work.float_calls[number], mask, firsts, frozenset())
        if missing:
            work.targets.append(output)
        found.append({key: tensors[0] for key, tensors in seen.items() if len(tensors) == 1})
    return found


@dataclass(frozen=True)
class Lacking:
    """Of a group's input in the quantized model: Hessians of two halves of the samples, and for each site E^T x [N, K]
    in both."""

    hessians: tuple[Hessian, Hessian]
    products: list[Halves]

    @property
    def hessian(self) -> Hessian:
        """Of all samples."""
        return self.hessians[0] + self.hessians[1]

    def changes(self) -> list[Tensor]:
        """What to add to each site's weight [N, K]."""
        return confirmed_changes((self.hessians[0].value, self.hessians[1].value), self.products)


def lacking(work: BlockWork, group: Sequence[SiteWork], exact: ActivationStore) -> Lacking:
    """What each site of the group lacks with the quantized model's inputs; every other sample is in the same half.

    All sites of the block that come before the group must have their final weights.
    """
    first = group[0]
    size, device = first.spec.in_features, first.weight.device
    hessians = Hessian(size), Hessian(size)
    sums = [[torch.zeros(site.spec.out_features, size, device=device) for site in group] for _ in hessians]
    drift = [torch.zeros(size, size, device=device) for _ in hessians]
    summed: Counter[int] = Counter()
    for number, wanted, seen in _runs(work, group, exact):
        half = number % 2
        for x in seen.get(f"x|{first.name}", []):
            hessians[half].add(x)
        if not _alike(seen, wanted, f"x|{first.name}"):
            continue
        x, aim = seen[f"x|{first.name}"][0], wanted[f"x|{first.name}"]
        plain = False
        for index, site in enumerate(group):
            key = f"sum|{site.name}"
            if _alike(seen, wanted, key) and len(wanted[key]) == len(x):
                sums[half][index].addmm_((wanted[key] - seen[key][0]).t(), x)
                summed[index] += 1
            else:
                plain = True
        if plain:
            drift[half].addmm_((aim - x).t(), x)
    products = []
    for index, site in enumerate(group):
        of = [sums[half][index] if summed[index] else site.weight.float() @ drift[half] for half in (0, 1)]
        products.append((of[0], of[1]))
    return Lacking(hessians, products)


def _runs(work: BlockWork, group: Sequence[SiteWork], exact: ActivationStore
          ) -> Iterator[tuple[int, Mapping[str, Tensor], dict[str, list[Tensor]]]]:
    """For each sample its number, what the float model gives at the group, and what the quantized one does."""
    first = group[0]
    with ExitStack() as stack:
        sample = None if work.kept is None else stack.enter_context(work.kept.adding())
        for number, mask in enumerate(work.masks):
            work.tell(f"{first.name}: {number + 1} of {len(work.calls)} samples")
            wanted = exact[number]
            keys = frozenset(key for site in group for key in (f"x|{first.name}", f"sum|{site.name}") if key in wanted)
            with nullcontext() if sample is None else sample(number):
                seen, _ = _one_run(work, group, work.calls[number], mask, {first.name}, keys)
            yield number, wanted, seen


def _alike(seen: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Tensor], key: str) -> bool:
    """Whether both models came to `key` once, with as many tokens: experts may see other tokens in each."""
    return key in wanted and len(seen.get(key, ())) == 1 and seen[key][0].shape == wanted[key].shape


def _one_run(work: BlockWork, sites: Sequence[SiteWork], call: tuple[Any, Any], mask: Tensor | None,
             firsts: set[str], enough: frozenset[str]) -> tuple[dict[str, list[Tensor]], Any]:
    """Inputs of the sites in `firsts` and sums of all `sites`, as rows, and the block's output.

    The run ends when it has all of `enough`, then without an output.
    """
    seen: dict[str, list[Tensor]] = {}
    output = None
    left = set(enough)

    def keep(key: str, value: Tensor) -> None:
        rows = counted_rows(value, mask)
        if len(rows):
            seen.setdefault(key, []).append(rows)
        left.discard(key)
        if enough and not left:
            raise _Enough

    def met(name: str, x: Tensor) -> None:
        if enough and work.kept is not None:
            work.kept.reached()
        if name in firsts:
            keep(f"x|{name}", x)

    watch = WatchSums({site.name: site.parameter for site in sites}, met,
                      lambda name, total: keep(f"sum|{name}", total))
    try:
        with work.rounding_activations({site.name for site in sites} if enough else set()), torch.no_grad(), watch:
            args, kwargs = call
            output = work.module(*args, **kwargs)
    except _Enough:
        pass
    return seen, output
