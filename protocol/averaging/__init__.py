"""Rounds: their members, the all-reduce, what is averaged and how, and when the result counts."""
