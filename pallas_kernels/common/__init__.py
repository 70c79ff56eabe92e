"""Building blocks of all kernels: tiles, gates, the triangular inverse, launching and partitioning."""
