"""Compiles the kernels for a named GPU where there is none, and reports what its assembler says of them."""
