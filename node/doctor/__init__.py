"""`shoal doctor`: what would keep a peer from working here, and what to do about it."""
