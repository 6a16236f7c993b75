"""Runs that start from a checkpoint: it is cut into parts, and every peer fetches those that it needs."""
