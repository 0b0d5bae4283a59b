"""kontext_jax: training image generation and editing models of the FLUX.1 Kontext kind, in JAX."""

__version__ = "0.1.0"
