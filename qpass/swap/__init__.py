"""Swap: decisions in, a model or a graph with packed layers in it out."""
