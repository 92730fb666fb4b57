"""Importing: `import qpass` loads nothing heavy and starts nothing; importing every module compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import qpass
from tests.source_tree import ROOT, modules

# Integrations, which import what they integrate with. Nothing else may.
INTEGRATIONS = ("qpass.hf", "qpass.cli", "qpass.demo", "qpass.kernels.cuda.programs")
API = ("quantize", "plan", "explain", "dequantize", "save", "load", "compare", "evaluate", "support_matrix", "search",
       "Scheme", "Rule", "Recipe", "PRESETS", "register_scheme", "register_kernel", "register_pass")

_WATCH = """
import json, os, sys
started = []
def watch(event, args):
    if event == "subprocess.Popen":
        started.append([str(a) for a in (args[1] if isinstance(args[1], (list, tuple)) else [args[1]])])
    elif event in ("os.system", "os.exec", "os.posix_spawn"):
        started.append([str(args[0])])
sys.addaudithook(watch)
"""
_TELL = """
torch = sys.modules.get("torch")
print(json.dumps({"loaded": sorted(sys.modules), "started": started,
                  "gpu": bool(torch and torch.cuda.is_initialized())}))
"""


def run_python(code: str, cache: Path) -> dict[str, Any]:
    """Run `code` in a new interpreter, outside the checkout, with an empty cache; returns what it printed last."""
    environment = {**os.environ, "QPASS_CACHE_DIR": str(cache)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=cache.parent, env=environment, text=True,
                          capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    seen = run_python(_WATCH + "import qpass\n" + _TELL, cache)
    heavy = {"torch", "torchao", "transformers", "triton", "numpy", "yaml", "safetensors", "tqdm", "qpass.kernels"}
    assert not heavy & set(seen["loaded"])
    assert not seen["started"]
    assert not cache.exists() or not list(cache.rglob("*"))


def test_importing_every_module_compiles_nothing(tmp_path: Path) -> None:
    names = [name for name in sorted(modules()) if not name.startswith(INTEGRATIONS) and name != "qpass.__main__"]
    cache = tmp_path / "cache"
    # torch comes first and unwatched: what it starts and loads on its own (Dynamo loads Triton where it is installed)
    # is not ours to answer for.
    code = f"import torch, torch._dynamo.utils\n{_WATCH}\nimport importlib\nbefore = set(sys.modules)\n"
    code += f"for name in {names!r}:\n    importlib.import_module(name)\n"
    seen = run_python(code + _TELL.replace("sorted(sys.modules)", "sorted(set(sys.modules) - before)"), cache)
    assert not {"torchao", "transformers", "triton", "torch._inductor.codecache"} & set(seen["loaded"])
    assert not seen["started"], f"started while importing: {seen['started']}"
    assert not seen["gpu"]
    assert not cache.exists() or not list(cache.rglob("*"))


@pytest.mark.parametrize("name", API)
def test_public_name(name: str) -> None:
    assert getattr(qpass, name) is not None
    assert name in dir(qpass)
    assert f"qpass.{name}" not in modules(), f"importing the module qpass/{name}.py would hide qpass.{name}"
    if callable(getattr(qpass, name)):
        assert getattr(qpass, name).__doc__, f"qpass.{name} says nothing of itself"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        qpass.quantise  # noqa: B018


@pytest.mark.parametrize("installed", [False, True])
def test_python_started_in_the_checkout_finds_the_installed_package_kernels(tmp_path: Path, installed: bool) -> None:
    """The checkout's folder `kernels` has the name of a package that Transformers looks for when it loads a model."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import Device\n__version__ = '0.15.0'\n")
        (tmp_path / "kernels" / "layer.py").write_text("class Device: ...\n")
    code = f"""
import sys; sys.path.append({str(tmp_path)!r})
import json, qpass.kernels.registry, kernels
assert qpass.kernels is not kernels
try:
    import kernels.registry
    second = True
except ModuleNotFoundError:
    second = False
print(json.dumps([getattr(kernels, "__version__", None), hasattr(kernels, "Device"), second]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["0.15.0" if installed else None, installed, False]


@pytest.mark.skipif(find_spec("transformers") is None, reason="Transformers is not installed")
def test_transformers_works_in_the_checkout() -> None:
    code = "import transformers.modeling_utils as m; print(m.PreTrainedModel.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PreTrainedModel"]
