"""A run: its manifest, founding, inviting, joining, listing, and taking the model out."""
