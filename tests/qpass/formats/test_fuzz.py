"""Fuzzing: files with flipped bits or cut short, and configs of any kind, are a named error or load as they were."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qpass
from qpass.errors import QPassError
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight
from tests.qpass.formats.fixture_folders import SMALL, digest

pytest.importorskip("transformers", reason="Transformers is not installed")
pytestmark = pytest.mark.slow

NAMES = sorted(str(folder.relative_to(SMALL)) for folder in SMALL.glob("*/*") if folder.is_dir())
_HANGS_AFTER, _MOST_MEMORY = 120, 512 << 10  # seconds; KB that loading a file of 100 KB may add to the process


def weights(model: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and digest of each weight, decoded, and of each parameter and buffer that stayed float."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedWeight):
            found[f"{path}.weight"] = module.dequantize(torch.float32)
        elif isinstance(module, QuantExperts):
            for which in (0, 1):
                found |= {f"{path}.{which}.{expert}": module.dequantize(which, expert, torch.float32)
                          for expert in range(module.site.experts)}
    packed = {id(buffer) for module in model.modules() if isinstance(module, PackedWeight)
              for buffer in module.buffers(recurse=False)}
    found |= {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]
              if id(tensor) not in packed and ".packed_" not in name}
    return {name: (tuple(tensor.shape), digest(tensor)) for name, tensor in found.items()}


@contextmanager
def bounded() -> Iterator[None]:
    """Neither a hang, in processor time, which other work does not lengthen, nor memory that no small file needs."""
    def hangs(*_: object) -> None:
        raise AssertionError("loading hangs")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, _HANGS_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MOST_MEMORY


def load(where: Path) -> Any:
    """The model, or None for a named error; anything else is raised."""
    try:
        with bounded():
            return qpass.load(where)
    except QPassError as error:
        assert str(error).strip()
        return None


def copied(name: str, folder: Path) -> tuple[Path, Path, int]:
    """A copy of a fixture: the file with the tensors, what to load, and where the file's header ends."""
    shutil.copytree(SMALL / name, folder)
    file = next(iter([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]))
    if file.suffix == ".gguf":
        from qpass.formats.gguf_file import read_gguf

        return file, file, min(info.start for info in read_gguf(file).tensors.values())
    return file, folder, 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_named_or_changes_no_more_than_it_hits(tmp_path: Path, name: str) -> None:
    file, where, header = copied(name, tmp_path / "out")
    whole = file.read_bytes()
    expected = weights(load(where))

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)), st.integers(0, 7))
    def check(position: int, bit: int) -> None:
        changed = bytearray(whole)
        changed[position] ^= 1 << bit
        file.write_bytes(bytes(changed))
        if (model := load(where)) is None:
            return
        found = weights(model)
        assert {key: shape for key, (shape, _) in found.items()} == {key: shape for key, (shape, _) in expected.items()}
        other = [key for key, value in found.items() if value != expected[key]]
        # In the header no flip may reach a number; in a tensor's bytes it reaches that tensor's, tied or not.
        is_config = file.suffix == ".gguf"  # whose header says more than where tensors are
        assert len(other) <= (2 if position >= header else 0) or (is_config and position < header)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    file, where, header = copied(name, tmp_path / "out")
    whole = file.read_bytes()

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.integers(0, header), st.integers(0, len(whole) - 33)))  # 32: GGUF ends in padding
    def check(length: int) -> None:
        file.write_bytes(whole[:length])
        assert load(where) is None

    check()


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from(["int", "float", "group", "channel", "re:(", "Linear", "torch.uint8", "gptq_v2", "nf4"]),
    st.lists(st.one_of(st.integers(-1, 200), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.text(max_size=3)), max_size=2))


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a config."""
    for key, value in (tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(tree))
    owner = copy
    for key in at[:-1]:
        owner = owner[key]
    if value is places:  # a value that nothing else is: left out
        del owner[at[-1]]
    else:
        owner[at[-1]] = value
    return copy


@pytest.mark.parametrize("name", [name for name in NAMES if (SMALL / name / "config.json").is_file()])
def test_a_config_of_any_kind_is_named_or_keeps_every_shape(tmp_path: Path, name: str) -> None:
    _, folder, _ = copied(name, tmp_path / "out")
    whole = json.loads((folder / "config.json").read_text())
    for other in ("quantize_config.json", "hf_quant_config.json"):
        (folder / other).unlink(missing_ok=True)
    expected = weights(load(folder))
    ways = [way for way in places(whole) if way[0] == "quantization_config" or len(way) == 1]

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sampled_from(ways), st.one_of(st.just(places), _VALUES))
    def check(way: tuple[Any, ...], value: Any) -> None:
        (folder / "config.json").write_text(json.dumps(changed(whole, way, value)))
        if (model := load(folder)) is not None:
            # Experts of a config under which they are not understood stay float, in parameters of their own.
            found = {key: shape for key, (shape, _) in weights(model).items() if ".experts." not in key}
            assert found == {key: shape for key, (shape, _) in expected.items() if ".experts." not in key}

    check()
