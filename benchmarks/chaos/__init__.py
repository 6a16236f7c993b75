"""Real peers in network namespaces, under faults from a tape that can be played again: `docs/chaos.md`."""
