"""Recipes: what the user asks for, in our words and in other tools'."""
