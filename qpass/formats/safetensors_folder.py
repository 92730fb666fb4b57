"""Safetensors folder: a folder in, its tensors' facts at once and their numbers one at a time out; one shard open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Stored
from qpass.formats.safetensors_file import file_version, read_folder

_REOPEN_AFTER = 32 << 20  # bytes read; pages of an open file count as this process's memory until it is closed


class SafetensorsFolder:
    """The Source of every format whose tensors stand in model.safetensors, or in shards that an index lists."""

    def __init__(self, folder: Path) -> None:
        self.tensors: Mapping[str, Stored]
        self.metadata: Mapping[str, Any]
        self.tensors, self.metadata = read_folder(folder)
        self._open: tuple[Path, Any] | None = None
        self._stack = ExitStack()
        self._read = 0

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors, in memory of their own. Raises CheckpointError if a file changed since its header was read."""
        from safetensors import SafetensorError

        read: dict[str, Tensor] = {}
        for name in names:
            stored = self.tensors[name]
            try:
                read[name] = self._opened(stored.file).get_tensor(name).clone()
                self._read += read[name].nbytes
                changed = file_version(stored.file) != stored.version
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot read {stored.file}: {error}") from error
            if changed:
                raise CheckpointError(f"{stored.file} changed while it was being read; load the folder again")
        return read

    def close(self) -> None:
        """Let go of the file that is open."""
        self._stack.close()
        self._open, self._read = None, 0

    def _opened(self, file: Path) -> Any:
        from safetensors import safe_open

        if self._open is None or self._open[0] != file or self._read > _REOPEN_AFTER:
            self.close()
            self._open = file, self._stack.enter_context(safe_open(str(file), framework="pt"))
        return self._open[1]
