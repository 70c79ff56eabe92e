"""Write the kernels as programs that run where JAX is, but no Triton that jax-triton takes."""
