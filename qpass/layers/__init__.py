"""Layers: what stands in a model where a float weight stood."""
