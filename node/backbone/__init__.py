"""The outer steps: when a fragment is merged, and the state that all have in common."""
