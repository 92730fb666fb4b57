"""Budget: a model and a number of bits, bytes or tokens a second in, the recipe that spends it best out."""
