"""Save and load: folders there and back, damage is named, and nothing is lost when writing fails."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qpass
import qpass.checkpoints.publish_folder as publish_folder
import qpass.formats.safetensors_file as safetensors_file
from qpass.errors import CheckpointError
from qpass.layers.packed_layers import PackedWeight, QuantLinear


class Mixed(nn.Module):
    """Linear layers, a parameter stored [K, N], a head tied to the first layer, buffers of both kinds."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Parameter(torch.randn(width, 2 * width) / 8)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.first.weight
        self.register_buffer("offset", torch.randn(width))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)) + self.offset
        return self.head(self.down(torch.relu(x @ self.up)))


X = torch.linspace(-2, 2, 3 * 64).reshape(3, 64)


def quantized(scheme: Any = "w4a8", width: int = 64) -> Mixed:
    return qpass.quantize(Mixed(width).eval(), scheme, example_inputs=(torch.zeros(3, width),), progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a16_asym", "w8a16", "w3a16"])
def test_round_trip_of_a_plain_module(tmp_path: Path, scheme: str) -> None:
    model = quantized(scheme)
    assert qpass.save(model, tmp_path / "out") == tmp_path / "out"
    loaded = qpass.load(tmp_path / "out", model=Mixed())
    assert torch.equal(loaded(X), model(X))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k,
                                                                       v in model.state_dict().items()}
    assert qpass.explain(loaded).rows == qpass.explain(model).rows
    assert qpass.explain(loaded).recipe == qpass.explain(model).recipe


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = quantized()
    qpass.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "first.weight_packed" in stored and not any(name.startswith("head.") for name in stored)
    loaded = qpass.load(tmp_path / "out", model=Mixed())
    pairs = zip(loaded.first.buffers(), loaded.head.buffers(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_model_on_meta_can_be_filled(tmp_path: Path) -> None:
    model = quantized()
    qpass.save(model, tmp_path / "out")
    with torch.device("meta"):
        empty = Mixed()
    empty.scratch = torch.zeros(3)
    loaded = qpass.load(tmp_path / "out", model=empty)
    assert torch.equal(loaded(X), model(X))
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_shards_and_index(tmp_path: Path) -> None:
    model = quantized()
    qpass.save(model, tmp_path / "out", max_shard_size="3KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((tmp_path / "out" / file).is_file() for file in files)
    assert torch.equal(qpass.load(tmp_path / "out", model=Mixed())(X), model(X))
    qpass.save(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_size"):
        qpass.save(model, tmp_path / "out", max_shard_size="many")


def test_the_file_is_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5, dtype=torch.bfloat16), "b": torch.arange(7, dtype=torch.int64),
               "c": torch.tensor(2.5),
               "d": torch.empty(0, 4), "e": torch.ones(3, dtype=torch.bool), "f": torch.randn(4, 6).t(),
               "g": torch.randn(5).to(torch.float8_e4m3fn)}
    entries = [safetensors_file.Entry(name=name, dtype=t.dtype, shape=tuple(t.shape), make=lambda t=t: t)
               for name, t in tensors.items()]
    safetensors_file.write_file(tmp_path / "x.safetensors", entries)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].float(), tensor.float()), name


def test_saving_over_an_old_folder_keeps_what_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "a.txt").write_text("kept")
    (out / "README.md").write_text("kept too")
    (out / "pytorch_model.bin").write_text("old weights")
    qpass.save(quantized(), out)
    model = quantized()
    qpass.save(model, out)
    assert (out / "notes" / "a.txt").read_text() == "kept" and (out / "README.md").read_text() == "kept too"
    assert not (out / "pytorch_model.bin").exists()
    assert torch.equal(qpass.load(out, model=Mixed())(X), model(X))
    assert os.listdir(tmp_path) == ["out"]


def test_the_current_directory_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("kept")
    inode = tmp_path.stat().st_ino
    model = quantized()
    qpass.save(quantized(), ".")
    qpass.save(model, ".")
    assert tmp_path.stat().st_ino == inode
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "other.txt"]
    assert torch.equal(qpass.load(tmp_path, model=Mixed())(X), model(X))


class Full:
    """Writes as the n-th write finds the disk full, or is interrupted."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
                         ids=["full disk", "Ctrl-C"])
@pytest.mark.parametrize("after", range(3))
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException,
                                             after: int, inside: bool) -> None:
    out = tmp_path / "out"
    qpass.save(quantized(), out)
    before = contents(tmp_path)
    other = quantized("w8a8")
    monkeypatch.setattr(publish_folder, "_can_rename", lambda target: not inside)
    monkeypatch.setattr(os, "fsync", Full(error, after))
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    try:
        with pytest.raises(expected) as raised:
            qpass.save(other, out, max_shard_size="3KB")
    finally:
        monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left" in str(raised.value) and str(out) in str(raised.value)
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="No space"):
        monkeypatch.setattr(os, "fsync", Full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 0))
        qpass.save(other, tmp_path / "new")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("when", range(6))
def test_replacing_file_by_file_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    out = tmp_path / "out"
    qpass.save(quantized(), out)
    before = contents(tmp_path)
    rename, calls = os.rename, [0]

    def failing(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == when + 1:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(publish_folder, "_can_rename", lambda target: False)
    monkeypatch.setattr(os, "rename", failing)
    if when < 4:
        with pytest.raises(CheckpointError, match="Input/output error"):
            qpass.save(quantized("w8a8"), out)
        assert contents(tmp_path) == before
    else:
        qpass.save(quantized("w8a8"), out)
        assert contents(tmp_path) != before


def test_folders_are_exchanged_where_the_system_cannot_do_it_at_once(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    qpass.save(quantized(), out)
    model = quantized()
    monkeypatch.setattr(publish_folder.ctypes, "CDLL", lambda *args, **kwargs: object())
    qpass.save(model, out)
    assert torch.equal(qpass.load(out, model=Mixed())(X), model(X))
    assert os.listdir(tmp_path) == ["out"]


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    qpass.save(quantized(), out)
    before = contents(tmp_path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out and access(path,
                                                                                      mode))  # tests may run as root
    with pytest.raises(CheckpointError, match="read-only"):
        qpass.save(quantized(), out)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr(os, "mkdir", Full(OSError(errno.EROFS, os.strerror(errno.EROFS)), 0))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        qpass.save(quantized(), out)
    assert contents(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        qpass.save(quantized(), tmp_path / "file")


def _save_often(out: str, value: int, times: int) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    for _ in range(times):
        qpass.save(model, out, max_shard_size="5KB")


def test_two_processes_saving_leave_one_of_both_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_save_often, args=(str(out), value, 15)) for value in (1, 2)]
    for process in both:
        process.start()
    seen, whole = set(), 0
    while any(process.is_alive() for process in both):
        try:
            seen.add(_value(out))
            whole += 1
        except CheckpointError:  # not there yet, or exchanged while it was being read
            continue
    for process in both:
        process.join()
        assert process.exitcode == 0
    seen.add(_value(out))
    assert seen <= {1.0, 2.0} and whole
    assert os.listdir(tmp_path) == ["out"]


def _value(out: Path) -> float:
    """The one value of all tensors of the folder."""
    model = qpass.load(out, model=nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))))
    values = {float(v) for p in model.parameters() for v in p.detach().flatten()}
    assert len(values) == 1, "a mix of two saves"
    return values.pop()


def rewrite(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def reconfigure(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9] + b"?" * 40 + file.read_bytes()[49:])


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]  # type: ignore[no-any-return]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, r"model\.safetensors is truncated or damaged"),
    "header": (flip_header, r"model\.safetensors is truncated or damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is truncated or damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no model\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds list"),
    "missing scale": (rewrite(lambda t: t.pop("down.weight_scale")), r"down.* needs down\.weight_scale"),
    "missing weight": (rewrite(lambda t: t.pop("down.weight_packed")), r"needs down\.weight_packed"),
    "missing float": (rewrite(lambda t: t.pop("offset")), r"offset is missing"),
    "unexpected": (rewrite(lambda t: t.update(more=torch.ones(2))), r"more in model\.safetensors has no place"),
    "float shape": (rewrite(lambda t: t.update(offset=torch.ones(65))), r"offset in .* \[65\], the model has .* "
                                                                        r"\[64\]"),
    "float dtype": (rewrite(lambda t: t.update(offset=torch.ones(64, dtype=torch.int8))), r"offset in .*int8"),
    "packed shape": (rewrite(lambda t: t.update({"down.weight_packed": t["down.weight_packed"][:, :-1].contiguous()})),
                     r"down\.weight_packed in .* \[64, 15\].* needs int32 \[64, 16\]"),
    "weight_shape": (rewrite(lambda t: t.update({"down.weight_shape": torch.tensor([64, 127])})), r"down.*\[64, 127\]"),
    "scale shape": (rewrite(lambda t: t.update({"down.weight_scale": t["down.weight_scale"][:-1].contiguous()})),
                    r"down.*weight_scale is \(63, 1\)"),
    "scale nan": (rewrite(lambda t: t["down.weight_scale"].fill_(float("nan"))), r"down.*weight_scale holds NaN"),
    "other bits": (reconfigure(lambda c: group(c).update(num_bits=8)), r"_packed in .*8-bit"),
    "other group": (reconfigure(lambda c: group(c).update(group_size=48)), r"48 does not divide"),
    "other symmetry": (reconfigure(lambda c: group(c).update(symmetric=False)), r"needs \w+\.weight_zero_point"),
    "layer unknown": (reconfigure(lambda c: c["qpass"]["layers"].update({"gone": c["qpass"]["layers"]["up"]}) or
                                  c["config_groups"]["group_0"]["targets"].append("gone")), r"gone is quantized"),
    "format": (reconfigure(lambda c: c.update(format="sparse-bitmask")), r"'sparse-bitmask' is not read"),
    "method": (reconfigure(lambda c: c.update(quant_method="aqlm")), r"'aqlm'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, kind: str, saved_once: Path) -> None:
    damage, said = DAMAGE[kind]
    out = tmp_path / "out"
    out.mkdir()
    for file in saved_once.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    damage(out)
    with pytest.raises(CheckpointError, match=said) as error:
        qpass.load(out, model=Mixed())
    assert str(out) in str(error.value) or "model.safetensors" in str(error.value)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qpass.save(quantized(), tmp_path_factory.mktemp("saved") / "out")


def test_headers_are_checked_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = qpass.save(quantized(), tmp_path / "out")
    rewrite(lambda t: t.update(more=torch.ones(2)))(out)
    monkeypatch.setattr("qpass.formats.safetensors_folder.SafetensorsFolder.read",
                        lambda *a: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match="no place"):
        qpass.load(out, model=Mixed())


def test_an_index_cannot_point_outside(tmp_path: Path) -> None:
    out = qpass.save(quantized(), tmp_path / "out", max_shard_size="3KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["offset"] = "../outside.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        qpass.load(out, model=Mixed())
    index["weight_map"]["offset"] = "model-00009-of-00009.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00009-of-00009\.safetensors is missing"):
        qpass.load(out, model=Mixed())


def test_load_a_float_folder_with_and_without_a_recipe(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    out = qpass.save(plain, tmp_path / "out")
    same = qpass.load(out, model=nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    assert torch.equal(same(X), plain(X))
    empty = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    packed = qpass.quantize(same, "w8a8", example_inputs=(X,), progress=False)
    assert isinstance(packed[0], QuantLinear)
    again = qpass.save(packed, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="quantized already"):
        qpass.load(again, qpass.Recipe("w4a8", ignore=()), model=empty)


def test_load_refuses_what_is_no_folder_or_has_no_class(tmp_path: Path, saved_once: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        qpass.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"qpass\.load\(folder, model=model\)"):
        qpass.load(saved_once)


def test_save_refuses_weights_without_numbers(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Mixed()
    with pytest.raises(CheckpointError, match="meta device"):
        qpass.save(model, tmp_path / "out")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        qpass.save({"a": 1}, tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_one_tensor_at_a_time_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = [0], [0]
    make = PackedWeight.tensor_on_disk

    def counted(self: PackedWeight, name: str) -> Tensor:
        tensor = make(self, name)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    monkeypatch.setattr(PackedWeight, "tensor_on_disk", counted)
    qpass.save(quantized(), tmp_path / "out")
    assert most[0] <= 2
