"""Kept outputs: what a block's modules gave before the layer at hand, sample by sample, in place of running them again.

While the layers of a block are rounded one after another, in graph order, each asks for a run of the block that ends
at its own product. What comes before that is final by then, so that what a module there gave is kept: the largest ones
that hold a rounded layer (an attention once its last product is rounded, and no longer its parts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qpass.calibrate.activation_store import ActivationStore, Budget
from qpass.calibrate.stand_ins import standing_in


class KeptOutputs:
    """Outputs of modules below `module` that are, or hold, one of `owners`; one run after another adds to them."""

    def __init__(self, module: nn.Module, owners: Iterable[nn.Module], budget: Budget) -> None:
        wanted = set(owners)
        self._modules = {path: part for path, part in module.named_modules()
                         if path and wanted & set(part.modules())}
        self._budget = budget
        self._stages: list[tuple[ActivationStore, set[str]]] = []
        self._found: dict[str, Any] | None = None  # of the run at hand; None once its layer is reached
        self._again: set[str] = set()

    def reached(self) -> None:
        """The layer at hand is: nothing from here on is final."""
        self._found = None

    @contextmanager
    def adding(self) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
        """A run over all samples: the context of sample `number` answers what is kept, and keeps what comes before
        `reached`."""
        store = ActivationStore(self._budget)
        common: list[set[str]] = []

        @contextmanager
        def sample(number: int) -> Iterator[None]:
            found: dict[str, Any] = {}
            self._found, self._again = found, set()
            try:
                with self.answering(number, keep=found):
                    yield
            finally:
                self._found = None
            whole = {path: value for path, value in found.items() if path not in self._again
                     and not any(path.startswith(f"{larger}.") for larger in found.keys() - self._again)}
            store.append(whole)
            common.append(set(whole))

        yield sample
        new = set.intersection(*common) if common else set()
        left = [(old, {path for path in paths if not any(path.startswith(f"{larger}.") for larger in new)})
                for old, paths in self._stages]
        for old, paths in left:
            if not paths:
                old.clear()
        self._stages = [(old, paths) for old, paths in (*left, (store, new)) if paths]
        if not new:
            store.clear()

    def answering(self, number: int, keep: dict[str, Any] | None = None) -> AbstractContextManager[None]:
        """Within, modules answer what they gave for sample `number`, as far as it is kept."""
        known = {path: values[path] for store, paths in self._stages for values in (store[number],) for path in paths}
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        for path, module in self._modules.items():
            if path in known:
                forwards.append((module, _answer(known[path])))
            elif keep is not None and not any(path.startswith(f"{larger}.") for larger in known):
                forwards.append((module, self._keeping(path, module.forward)))
        return standing_in(forwards)

    def clear(self) -> None:
        """Forget everything."""
        for store, _ in self._stages:
            store.clear()
        self._stages = []

    def _keeping(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._found is not None:
                if path in self._found:
                    self._again.add(path)  # one answer would stand for two calls
                self._found[path] = _copied(output)
            return output

        return kept


def _answer(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _copied(output)


def _copied(output: Any) -> Any:
    """Models add to tensors in place."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)
