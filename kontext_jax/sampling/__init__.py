"""Generates images, and stores with each image how it was made."""
