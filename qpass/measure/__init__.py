"""Measure: models in, what their layers compute out."""
