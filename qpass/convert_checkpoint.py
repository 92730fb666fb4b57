"""Convert: a checkpoint of one format in, the same integers in another format out, and a table of what changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qpass.checkpoints.model_folder import TokenizerFiles
from qpass.checkpoints.publish_folder import check_target
from qpass.errors import CheckpointError
from qpass.inspect_checkpoint import Inspection, inspect
from qpass.reports.bands import pattern, without_indices
from qpass.reports.text_table import Column, human_bytes, text_table

_COLUMNS: tuple[Column, ...] = (("n", ">"), ("layer", "<"), ("numbers before", "<"), ("numbers after", "<"),
                                ("bytes before", ">"), ("bytes after", ">"))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Both checkpoints as `inspect` sees them. `str()` is a table of what changed, layers of one pattern together."""

    before: Inspection
    after: Inspection

    def __str__(self) -> str:
        known = {layer.path: layer for layer in self.before.layers}
        groups: dict[tuple[str, ...], list[str]] = {}
        sizes: dict[tuple[str, ...], list[int]] = {}
        for layer in self.after.layers:
            old = known.get(layer.path)
            key = (without_indices(layer.path), old.numbers if old else "(of several tensors)", layer.numbers)
            groups.setdefault(key, []).append(layer.path)
            total = sizes.setdefault(key, [0, 0])
            total[0] += old.nbytes if old else 0
            total[1] += layer.nbytes
        rows = [(str(len(paths)), pattern(paths), *key[1:], *map(human_bytes, sizes[key]))
                for key, paths in groups.items()]
        changed = sum(len(paths) for key, paths in groups.items() if key[1] != key[2])
        return "\n".join([
            text_table(_COLUMNS, rows),
            f"{self.before.format or 'float'} -> {self.after.format}: {human_bytes(self.before.nbytes)} -> "
            f"{human_bytes(self.after.nbytes)}; codes, scales and zero points are the same"
            + (f"; {changed} layers are described otherwise" if changed else ""),
            f"saved in {self.after.path}"])


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str], *, to: str) -> Conversion:
    """Load `source` and save it as format `to` in the folder `destination`, with its tokenizer; what changed.

    Raises CheckpointError if the source is a float model, the destination is not empty, or the format cannot hold the
    numbers.
    """
    from qpass.load_model import load
    from qpass.save_model import save

    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is not empty; choose another folder")
    check_target(target)
    before = inspect(source)
    if before.format is None:
        raise CheckpointError(f"the model in {before.path} is not quantized; qpass quantize does that")
    folder = Path(before.path)
    tokenizer = TokenizerFiles(folder if folder.is_dir() else folder.parent)
    save(load(source), target, format=to, tokenizer=tokenizer if tokenizer.paths else None)
    return Conversion(before=before, after=inspect(target))
