"""Shoal: a peer-to-peer node for training Mixture-of-Experts language models in a swarm.

`node` is the process, `protocol` is what peers say to each other, `kernels` is the numerics. Each imports only what
stands to its right.
"""

__version__ = "0.1.0"
