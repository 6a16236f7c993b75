"""Stand-ins between peers: an owner fits, chooses and publishes its own, a composer follows all others."""
