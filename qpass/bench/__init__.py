"""Bench: a user's model and recipes in, speed, memory and accuracy side by side out."""
