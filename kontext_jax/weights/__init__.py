"""Weights of the PyTorch ecosystem, in and out, bit for bit.

One name table per network (``flux.py, autoencoder.py, t5.py, clip.py``), used in both directions;
``table.py`` has the language they are written in. A `Reader` gives one layer of one of our
parameters, wherever it is stored; ``loading.py`` puts it on a mesh, ``export.py`` writes it out.
safetensors only: no pickle is ever loaded.
"""
