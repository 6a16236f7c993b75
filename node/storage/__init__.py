"""What lies in a peer's data directory: checkpoints, known peers, ports, its lock."""
