"""Work folder: what calibration found for each block goes into files, from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpass.calibrate.samples import Sample
from qpass.errors import CalibrationError

_SAMPLED = 4096  # numbers of each parameter that the fingerprint reads


class WorkFolder:
    """One file a block, and `run.json` with the fingerprint of the run that they belong to."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Raises CalibrationError if the folder holds the work of another run."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        stamp = path / "run.json"
        if stamp.exists():
            try:
                known = json.loads(stamp.read_text(encoding="utf-8")).get("fingerprint")
            except (OSError, ValueError, AttributeError) as error:
                raise CalibrationError(f"{stamp} cannot be read: {error}; give an empty work folder") from error
            if known != fingerprint:
                raise CalibrationError(f"{path} holds the work of a calibration with another model, recipe or data; "
                                       "give an empty work folder, or delete that one")
        elif any(path.iterdir()):
            raise CalibrationError(f"{path} is not empty and holds no calibration; give an empty work folder")
        else:
            stamp.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")

    def load(self, number: int) -> dict[str, Tensor] | None:
        """What `save` kept of this block, if it got that far."""
        path = self._file(number)
        return load_file(path) if path.exists() else None

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block's result; a file appears whole or not at all."""
        half = self._file(number).with_suffix(".half")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, half)
        half.rename(self._file(number))

    def _file(self, number: int) -> Path:
        return self.path / f"block-{number:05}.safetensors"


def fingerprint_of(model: nn.Module, samples: Sequence[Sample], said: str) -> str:
    """A hash of what a run depends on: `said` (recipe and settings), the samples, and numbers of every parameter."""
    digest = hashlib.sha256(said.encode())
    for sample in samples:
        for tensor in sample.tensors:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        seen = flat[::max(1, flat.numel() // _SAMPLED)].double().cpu()
        digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
        digest.update(seen.numpy().tobytes())
    return digest.hexdigest()
