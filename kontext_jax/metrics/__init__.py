"""Pure functions from images to numbers."""
