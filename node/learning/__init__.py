"""What learns: composers and workers, their optimizer, their text, and the thread that steps them. No network."""
