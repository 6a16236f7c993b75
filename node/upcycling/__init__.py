"""`shoal upcycle`: a Mixture-of-Experts checkpoint out of a dense one, which computes the same to begin with."""
