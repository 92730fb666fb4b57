"""The library of emulated kernels, compiled once for all tests of it."""

from __future__ import annotations

import ctypes
import os

import pytest

from tests.kernels.cpu.emulated_kernels import compile_emulation


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    prebuilt = os.environ.get("QPASS_TEST_EMULATED_LIBRARY")  # how the sanitizer test hands over its build
    return ctypes.CDLL(prebuilt or str(compile_emulation(tmp_path_factory.mktemp("emulated"))))
