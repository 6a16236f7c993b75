"""What a composer's tokens teach the experts of others: collected, sent, received, learned from."""
