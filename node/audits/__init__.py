"""Auditing owners without data: steps on record, and the arithmetic that takes them again."""
