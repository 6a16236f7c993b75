"""Numerics: torch in, torch out. Knows nothing of peers."""
