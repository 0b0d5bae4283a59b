"""Weights in PyTorch's file formats, read and written bit for bit.

Each network has one name table (``flux.py, autoencoder.py, t5.py, clip.py, dino.py,
clip_vision.py``), used in both directions and written in the language of ``table.py``. A `Reader`
returns one layer of one parameter, wherever it is stored; ``loading.py`` puts it on a mesh and
``export.py`` writes it.

Networks that are trained or sampled are read from safetensors and Orbax checkpoints only. The
networks of metrics (EfficientNet-Lite0, FID's Inception, LPIPS) are published as PyTorch's ``.pth``
files, which are pickles; ``torch_legacy.py`` reads the tensors in them without unpickling: it calls
nothing that a file names.
"""
