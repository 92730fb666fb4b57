"""Check types: mypy --strict over a throwaway tree of links that looks like the installed package.

mypy cannot follow an editable install whose packages stand in several folders, so the tree puts them side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def link_tree(target: Path) -> None:
    """Fill `target` with qpass/ as an installation has it: the entries of qpass/, and `lowering` and `kernels`."""
    package = target / "qpass"
    package.mkdir()
    for entry in (ROOT / "qpass").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("lowering", "kernels"):
        (package / name).symlink_to(ROOT / name)


def main() -> int:
    """Run mypy on the tree; its paths are printed as they are in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        link_tree(Path(folder))
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"),
                   "--cache-dir", str(ROOT / ".mypy_cache"), "-p", "qpass"]
        environment = {**os.environ, "MYPYPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    for line in done.stdout.splitlines():
        print(line.replace("qpass/lowering/", "lowering/").replace("qpass/kernels/", "kernels/"))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
