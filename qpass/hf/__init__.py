"""Transformers: what its loading, its configs, its caches and its attention are told of quantized models."""
