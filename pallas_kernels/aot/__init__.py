"""Ahead-of-time compilation of the kernels for a GPU that is not present, with the assembler's report on each."""
