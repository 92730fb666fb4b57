"""Format registry: the README tells what is registered, names are unique, and a package of one's own adds a format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qpass
from qpass.errors import CheckpointError, DuplicateRegistration
from qpass.formats import format_registry
from qpass.formats.format_registry import Format, formats, formats_table, open_checkpoint, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead
from qpass.layers.packed_layers import QuantLinear
from qpass.scheme import WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight
from tests.qpass.formats.fixture_folders import SMALL

README = Path(__file__).resolve().parents[3] / "README.md"


def test_the_readme_has_the_registered_formats() -> None:
    assert formats_table() in README.read_text(), f"put this into README.md:\n{formats_table()}"


class ShoutReader(Reader):
    """`<path>.CODES` int8 [N, K] and `<path>.STEP` float32 [N, 1]."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        if f"{place.path}.CODES" not in self.checkpoint.tensors:
            return None
        n, k = place.shape
        spec = LinearSpec(family="w8a16", weight=WeightArgs(bits=8), activation=None, out_features=n, in_features=k)
        need = self.checkpoint.need
        return WeightRead(spec=spec, read=self.read, tensors={
            "codes": need(f"{place.path}.CODES", of=place.path, dtype=torch.int8, shape=(n, k)),
            "step": need(f"{place.path}.STEP", of=place.path, dtype=torch.float32, shape=(n, 1))})

    @staticmethod
    def read(tensors: dict[str, Tensor], spec: LinearSpec) -> CanonicalWeight:
        return CanonicalWeight({"qweight": tensors["codes"], "scale": tensors["step"]})

    def leftover(self, name: str) -> str | None:
        return "a remark" if name.endswith(".REMARK") else None


def test_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_registry, "_FORMATS", dict(formats()))
    made = register_format(Format(name="shout", title="Shout", methods=("shout",), reader=ShoutReader))
    with pytest.raises(DuplicateRegistration, match="'shout' is registered already"):
        register_format(made)
    with pytest.raises(DuplicateRegistration, match="'gptq'"):
        register_format(Format(name="other", title="Other", methods=("gptq",), reader=ShoutReader))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "shout"}}))
    codes, step = torch.randint(-128, 128, (32, 64), dtype=torch.int8), torch.rand(32, 1) + 0.5
    tensors = {"0.CODES": codes, "0.STEP": step, "0.bias": torch.zeros(32), "0.REMARK": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = qpass.load(tmp_path, model=nn.Sequential(nn.Linear(64, 32)))
    assert isinstance(model[0], QuantLinear)  # type: ignore[index]
    assert torch.equal(model[0].dequantize(torch.float32), codes.float() * step)  # type: ignore[index]
    save_file({**tensors, "0.more": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.more in model\.safetensors has no place"):
        qpass.load(tmp_path, model=nn.Sequential(nn.Linear(64, 32)))
    save_file({**tensors, "0.CODES": codes[:, :63].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.CODES in .* \[32, 63\]; 0 needs int8 \[32, 64\]"):
        qpass.load(tmp_path, model=nn.Sequential(nn.Linear(64, 32)))


def test_a_clone_tests_every_format() -> None:
    """Each registered format has a checkpoint of its tool in the repository; DeepSpeedFP's are floats, built in
    test_variants.py. All of them together stay small."""
    found = set()
    for folder in SMALL.glob("*/*"):
        if folder.is_dir():
            chosen, _ = open_checkpoint(next(iter(folder.glob("*.gguf")), folder))
            assert chosen is not None, folder
            found.add(chosen.name)
    assert found == set(formats()) - {"deepspeedfp"}
    assert sum(file.stat().st_size for file in SMALL.rglob("*") if file.is_file()) <= 3 * 10**6
