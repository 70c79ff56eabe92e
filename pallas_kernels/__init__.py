"""Pallas Mosaic GPU kernels for Hopper: arrays in, arrays out. `osdn_jax.ops` registers them as implementations.

`delta_rule.delta_rule` and `hypergradient.hypergradient` are the entry points; docs/kernels.md is the map of the rest.
"""
