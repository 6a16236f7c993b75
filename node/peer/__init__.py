"""A peer's life: its parts put together, being a member, serving, ways in and out, resting, coming back."""
