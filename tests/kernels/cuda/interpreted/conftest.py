"""These tests run in a process of their own, in which Triton interprets: see test_interpreted.py."""

from __future__ import annotations

import importlib.util
import os

from tests.kernels.cuda.interpreter import use_interpreter

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    use_interpreter()
else:
    collect_ignore_glob = ["test_*.py"]
