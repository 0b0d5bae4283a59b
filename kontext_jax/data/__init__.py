"""Data sets of triples: building, storing, reading, packing and loading."""
