"""Activation store: trees of tensors in, the same trees out by number; past a limit of bytes they lie in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_COMPARED = 1 << 20  # elements; rotary tables and masks repeat from sample to sample, hidden states never do


class Budget:
    """Bytes of activations that may lie in memory, over all stores; the rest goes to files in `folder`."""

    def __init__(self, limit: int | None, folder: Path) -> None:
        """`limit` None keeps everything in memory."""
        self.limit, self.folder = limit, folder
        self.used, self._files = 0, 0

    def next_file(self) -> Path:
        self._files += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"activations-{self._files:06}.safetensors"


class ActivationStore:
    """An append-only list of trees. Equal tensors of neighbouring trees are kept once."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._items: list[tuple[Any, list[Any], Path | None]] = []
        self._bytes = 0

    def append(self, tree: Any) -> None:
        leaves, structure = tree_flatten(tree)
        last = next((item for item in reversed(self._items) if item[2] is None), None)
        if last is not None and last[0] == structure:
            leaves = [_shared(old, new) for old, new in zip(last[1], leaves, strict=True)]
        known = set() if last is None else {id(leaf) for leaf in last[1]}
        fresh = {str(index): leaf for index, leaf in enumerate(leaves)
                 if isinstance(leaf, Tensor) and id(leaf) not in known}
        size = sum(leaf.numel() * leaf.element_size() for leaf in fresh.values())
        limit = self.budget.limit
        if limit is not None and self.budget.used + size > limit and fresh:
            path = self.budget.next_file()
            save_file({name: leaf.detach().cpu().contiguous().clone() for name, leaf in fresh.items()}, path)
            held = [leaf.device if str(index) in fresh else leaf for index, leaf in enumerate(leaves)]
            self._items.append((structure, held, path))
            return
        self.budget.used += size
        self._bytes += size
        self._items.append((structure, leaves, None))

    def __getitem__(self, number: int) -> Any:
        structure, leaves, path = self._items[number]
        if path is not None:
            found = load_file(path)
            leaves = [found[str(index)].to(leaf) if str(index) in found else leaf for index, leaf in enumerate(leaves)]
        return tree_unflatten(leaves, structure)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            yield self[number]

    def clear(self) -> None:
        """Forget everything; files are removed."""
        for _, _, path in self._items:
            if path is not None:
                path.unlink(missing_ok=True)
        self._items.clear()
        self.budget.used -= self._bytes
        self._bytes = 0


def _shared(old: Any, new: Any) -> Any:
    same = (isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape and old.dtype == new.dtype
            and new.numel() <= _COMPARED and torch.equal(old, new))
    return old if same else new
