"""The swarm's directory: signed records in the DHT and by gossip, and what they say when put together."""
