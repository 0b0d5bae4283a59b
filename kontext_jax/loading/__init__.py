"""Reads weights and configs from their locations, and loads networks onto a mesh."""
