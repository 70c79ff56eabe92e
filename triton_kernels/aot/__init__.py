"""Ahead-of-time compilation of the kernels for a GPU that is not present, with what the assembler says of each."""
