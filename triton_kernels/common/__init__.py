"""Launching, interpreting and settings, for all kernels."""
