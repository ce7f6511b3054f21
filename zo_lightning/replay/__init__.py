"""A run kept whole in little: its start, and for each step the scalars from which its weights can be rebuilt."""
