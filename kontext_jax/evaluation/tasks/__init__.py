"""Task sets: triples, KontextBench, MagicBrush, the toy world, and identity probes."""
