"""The py-libp2p data plane: a host in its own interpreter and the asyncio client that drives it."""
