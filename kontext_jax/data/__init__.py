"""Triples: made, stored, read, transformed, packed and served."""
