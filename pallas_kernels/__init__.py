"""Pallas Mosaic GPU kernels for Hopper: arrays in, arrays out. `osdn_jax.ops` registers them as implementations.

The entry points are `delta_rule.delta_rule`, `hypergradient.hypergradient` and `gram.gram`. docs/kernels.md describes
the kernels behind them.
"""
