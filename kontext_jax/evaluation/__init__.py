"""Evaluation: task sets, image generation, judges, held-out losses, and their summaries."""
