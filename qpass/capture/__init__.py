"""Capture: a model in, one graph of its ATen calls and the products in it out."""
