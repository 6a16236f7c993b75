"""What a running peer shows: state, Prometheus metrics, health, the status page."""
