"""Who should own which expert, and what travels for it: stand-ins, sketches, names, audits. Pure."""
