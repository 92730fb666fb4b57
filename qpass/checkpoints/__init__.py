"""Checkpoints: what a folder's tensors are to a model's parameters, whatever format they are in."""
