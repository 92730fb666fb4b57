"""Codecs: the number formats that are not plain integers, one a file, each from float weight to tensors and back.

All of them are stored in memory as they stand in a checkpoint and multiplied through the reference, which decodes some
rows at a time; a kernel may take one over.
"""

from __future__ import annotations

from qpass.codecs import (  # noqa: F401  (each registers itself)
    affine,
    codebook,
    fp8,
    ggml_blocks,
    hqq_columns,
    int8_absmax,
    int_columns,
    microscaling,
    nvfp4,
)
