"""osdn-jax: the preconditioned delta rule in JAX and Flax."""

__version__ = "0.2.0"
