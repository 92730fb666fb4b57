"""Checkout: makes `import qpass` find the library of this checkout where it is not installed, as links in a folder."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_checkout() -> None:
    """Put a folder with `qpass`, its `kernels` and `lowering` inside, and `tests` in front of sys.path.

    Not the checkout: there Transformers would take our `kernels` for the package of that name. The folder is left to
    the operating system: modules are read from it as long as the process lives.
    """
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    package = Path(tempfile.mkdtemp(prefix="qpass-checkout-")) / "qpass"
    package.mkdir()
    for entry in (ROOT / "qpass").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in ("lowering", "kernels"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(package.parent))
    (package.parent / "tests").symlink_to(ROOT / "tests")
    found = importlib.util.find_spec("qpass")
    if found is None or found.origin is None or Path(found.origin).parent != package:
        raise RuntimeError(f"qpass comes from {found and found.origin}, not from the checkout {ROOT}")
