"""Triton kernels of the delta rule and its preconditioners, launched through jax-triton or interpreted on a CPU.

They serve NVIDIA GPUs of compute capability 8.0 or later. Importing this package imports no Triton; the modules with
kernels do. Neither it nor its modules import anything of `osdn_jax`.
"""
