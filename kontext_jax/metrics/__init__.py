"""Metrics: pure functions from images, text or feature vectors to numbers."""
