"""What peers say to each other: signed records, messages, transport, averaging. Knows nothing of transformers."""
