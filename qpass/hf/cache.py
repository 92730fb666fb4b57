"""QuantizedCache: a Transformers cache whose keys and values are int8, fp8 or int4, and a checkpoint's scales of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from qpass.cache_numbers import CacheNumbers
from qpass.errors import CheckpointError, QPassError
from qpass.formats.format_registry import open_checkpoint
from qpass.hf.attention import NAME
from qpass.hf.cache_layers import QuantizedCacheLayer, StaticQuantizedCacheLayer

Scales = Mapping[int, tuple[Tensor, Tensor]]
_SCALE = re.compile(r"(?:^|\.)layers\.(\d+)\..*?(?:([kv])_proj\.)?(?:([kv])_scale|output_scale)$")
_GRANULARITY = {"tensor": "per_tensor", "attn_head": "per_head", "token": "per_token", "group": "per_group"}


class QuantizedCache(Cache):
    """Half or a quarter of the memory of a float cache; `model.generate(..., past_key_values=QuantizedCache(model))`.

    model          a Transformers model, which is set to the attention `qpass` that reads the codes as they are; or a
                   config: then that is done only if its attn_implementation is `qpass`, and otherwise keys and values
                   of a layer are decoded for whatever attention there is
    kind           "int8", "fp8" (e4m3) or "int4"
    granularity    "per_token" (default), "per_head", "per_tensor", or "per_group" (int4's default); see CacheNumbers
    group_size     of "per_group", by default 32
    max_cache_len  gives a static cache, for torch.compile; without it the cache grows
    scales         of static granularities, by layer: (key, value); `cache_scales(folder)` reads a checkpoint's

    Raises RecipeError for what cannot be stored and QPassError for layers that are no attention.
    """

    def __init__(self, model: Any, kind: str = "int8", granularity: str | None = None, *, group_size: int = 32,
                 max_cache_len: int | None = None, scales: Scales | None = None) -> None:
        if isinstance(model, PreTrainedModel):
            model.set_attn_implementation(NAME)
        config = getattr(model, "config", model).get_text_config(decoder=True)
        chosen = granularity or ("per_group" if kind == "int4" else "per_token")
        numbers = CacheNumbers(kind=kind, granularity=chosen,  # type: ignore[arg-type]
                               group_size=group_size if chosen == "per_group" else None)
        if scales is not None and not numbers.static:
            raise QPassError(f"scales were given, and a cache {numbers} computes its own; choose per_tensor or "
                             "per_head")
        types, settings = get_layer_types_and_kwargs(config)
        if isinstance(settings, dict):  # Transformers to 5.17 at least: one for all, meant for those it names
            settings = [settings if kind == "sliding_attention" else {} for kind in types]
        if unknown := [kind for kind in types if kind not in ("full_attention", "sliding_attention")]:
            raise QPassError(f"the model has layers of {unknown[0]}, whose state is not keys and values; use its own "
                             "cache")
        if scales is not None and (missing := [i for i in range(len(types)) if i not in scales]):
            raise QPassError(f"scales are missing for layer {missing[0]}; give those of all {len(types)} layers")
        direct = config._attn_implementation == NAME
        layers: list[Any] = []
        for index, own in enumerate(settings):
            common: dict[str, Any] = {"direct": direct, "scales": None if scales is None else scales[index],
                                      "window": own.get("sliding_window")}
            layers.append(QuantizedCacheLayer(numbers, **common) if max_cache_len is None else
                          StaticQuantizedCacheLayer(numbers, max_cache_len=max_cache_len, **common))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated in all layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedCacheLayer))

    @classmethod
    def from_checkpoint(cls, model: Any, folder: str | os.PathLike[str], *, max_cache_len: int | None = None
                        ) -> QuantizedCache:
        """The cache that a checkpoint was calibrated for: its `kv_cache_scheme` and its k_scale and v_scale.

        Raises CheckpointError if it says nothing of a cache, or what cannot be had here.
        """
        _, checkpoint = open_checkpoint(folder)
        scheme = checkpoint.quantization.get("kv_cache_scheme")
        if not isinstance(scheme, Mapping):
            raise CheckpointError(f"{folder}: config.json has no kv_cache_scheme; choose one: QuantizedCache(model, "
                                  "'int8')")
        bits, kind = scheme.get("num_bits"), scheme.get("type", "int")
        granularity = _GRANULARITY.get(str(getattr(scheme.get("strategy"), "value", scheme.get("strategy", "tensor"))))
        if (kind, bits) not in (("float", 8), ("int", 8)) or granularity is None or not scheme.get("symmetric", True):
            raise CheckpointError(f"{folder}: kv_cache_scheme asks for {dict(scheme)}, and a cache holds symmetric "
                                  "int8 or fp8, with scales per tensor, head or token")
        made = CacheNumbers(kind="fp8" if kind == "float" else "int8", granularity="per_token"
                            if scheme.get("dynamic") else granularity)  # type: ignore[arg-type]
        return cls(model, made.kind, made.granularity, max_cache_len=max_cache_len,
                   scales=cache_scales(folder) if made.static else None)


def cache_scales(folder: str | os.PathLike[str]) -> dict[int, tuple[Tensor, Tensor]]:
    """A checkpoint's scales of keys and values by layer, float32 [heads or 1]. One that stands alone serves both.

    Reads compressed-tensors' `k_scale`, ModelOpt's `k_proj.k_scale` and Quark's `k_proj.output_scale`. Raises
    CheckpointError if there are none, or one that is no positive number.
    """
    _, checkpoint = open_checkpoint(Path(folder))
    found: dict[int, dict[str, Tensor]] = {}
    for name in checkpoint.tensors:
        if (match := _SCALE.search(name)) is None or not (match[2] or match[3]):
            continue
        scale = checkpoint.source.read([name])[name].float().reshape(-1)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(f"{name} in {folder} is {scale.tolist()[:4]}; scales are positive numbers")
        found.setdefault(int(match[1]), {})[match[3] or match[2]] = scale
    if not found:
        raise CheckpointError(f"{folder} holds no scales of keys and values (k_scale, v_scale)")
    return {layer: (both.get("k", both.get("v", torch.ones(1))), both.get("v", both.get("k", torch.ones(1))))
            for layer, both in sorted(found.items())}
