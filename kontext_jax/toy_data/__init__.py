"""Example data: a procedural world with exact ground truth and its checker, and icon-set edits.

Your own data goes through `kontext_jax.data` instead.
"""
