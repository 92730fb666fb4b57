"""Decide: sites and a recipe in, what happens to each of them out."""
