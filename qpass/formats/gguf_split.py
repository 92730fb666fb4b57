"""GGUF split: one file of a model that was split in, all its files as one out.

Source: llama.cpp, tools/gguf-split: the names end in -00001-of-00003.gguf, counted from 1; each file has `split.no`,
counted from 0, and `split.count`, the first has the metadata, and `split.tensors.count` is the number of all tensors.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from qpass.errors import CheckpointError
from qpass.formats.checkpoint import check_inside
from qpass.formats.gguf_file import GgufFile, read_gguf

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_of(files: list[Path]) -> Path | None:
    """The only file, or the first one of a model that was split into just these; None for anything else."""
    if len(files) == 1:
        return files[0]
    named = [_NAME.fullmatch(file.name) for file in files]
    parts = {(match["stem"], match["count"]) for match in named if match is not None}
    return min(files) if len(parts) == 1 and all(named) else None


def read_whole(path: Path) -> GgufFile:
    """The header of `path`, and those of the files beside it if it is a part of a model.

    Raises CheckpointError, naming the file, if a part is missing, is another model's, or has a tensor of another part.
    """
    file = read_gguf(path)
    count = file.metadata.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return file
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(f"{path} is one of {count} parts of a model, and its name does not say which; give the "
                              f"files their names again: name-00001-of-{count:05d}.gguf and so on")
    parts = []
    for number in range(1, count + 1):
        beside = path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not beside.exists():
            raise CheckpointError(f"{beside} is missing; the model is in {count} parts, and all are needed")
        check_inside(beside)
        parts.append(file if beside == path else read_gguf(beside))
        said = parts[-1].metadata.get("split.no"), parts[-1].metadata.get("split.count")
        if said != (number - 1, count):
            raise CheckpointError(f"{beside} says that it is part {said[0]} of {said[1]}, counted from 0")
    holders: dict[str, GgufFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in holders:
                raise CheckpointError(f"{name} stands in two files: {holders[name].path} and {part.path}")
            holders[name] = part
    wanted = parts[0].metadata.get("split.tensors.count", len(holders))
    if wanted != len(holders):
        raise CheckpointError(f"{path}: the parts hold {len(holders)} tensors, and the model has {wanted}")
    return replace(parts[0], tensors={name: part.tensors[name] for name, part in holders.items()}, holders=holders)
