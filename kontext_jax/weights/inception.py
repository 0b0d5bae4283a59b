"""The weights of FID's InceptionV3, which mseitzer/pytorch-fid converted from TensorFlow.

They are read from a local file, the one at ``URL`` or the same tensors as safetensors, and never
downloaded. Only a Frechet distance of these weights' features may be called FID, and only the file
at ``URL`` is known to hold them (`is_fid`). With any other file, including a copy as safetensors,
the metric is called ``fd_inception``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kontext_jax.files import sha256_of
from kontext_jax.models.inception import Inception, InceptionConfig
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import (
    BATCH_NORM_TENSORS,
    fold_batch_norm,
    network_from_arrays,
    read_file,
)

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)

FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the file at ``URL``, which has 95,628,359 bytes."""

NUM_CLASSES = 1008
"""Classes of the classifier, which is checked but not loaded: 1,000 and 8 unused ones."""

EPSILON = 1e-3
"""Epsilon of the batch norms."""


def load_inception(path: Path, mesh: Mesh, config: InceptionConfig | None = None) -> Inception:
    """Loads FID's network and folds its batch norms into the convolutions.

    Args:
      path: a .pth file of pytorch-fid, or a .safetensors file with the same tensors.
      mesh: device mesh.
      config: config of the network; None takes FID's.

    Raises:
      FileNotFoundError: the file does not exist; the message says where to download it.
      WeightsError: the file cannot be read or does not fit; the message names every tensor that is
        missing, unexpected, or of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; download FID's network from {URL}")
    config = config or InceptionConfig()
    abstract = nnx.eval_shape(lambda: Inception(config, rngs=nnx.Rngs(0)))
    params = named_leaves(abstract)
    convolutions = [name.removesuffix("/kernel") for name in params if name.endswith("/kernel")]
    tensors = _read(path)
    shapes = _shapes(config, {name: params[f"{name}/kernel"].shape for name in convolutions})
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())]
    for name, tensor in sorted(tensors.items()):
        if name not in shapes:
            wrong.append(f"{name} is unexpected")
        elif tensor.shape != shapes[name]:
            wrong.append(f"{name} is {tensor.shape}, not {shapes[name]}")
    if wrong:
        raise WeightsError(f"{path} does not fit FID's network: {'; '.join(wrong)}.")
    arrays = {}
    for name in convolutions:
        weight = tensors[f"{_theirs(name)}.conv.weight"]
        norm = [tensors[f"{_theirs(name)}.bn.{kind}"] for kind in BATCH_NORM_TENSORS]
        arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = fold_batch_norm(weight, norm, EPSILON)
    return network_from_arrays(abstract, arrays, mesh)


def is_fid(path: Path) -> bool:
    """Returns whether a file equals the one at ``URL``, byte for byte."""
    return sha256_of(path) == FID_SHA256


def _read(path: Path) -> dict[str, np.ndarray]:
    """Returns a file's tensors without the norms' batch counters, which are for training only."""
    tensors = read_file(path).items()
    return {name: x for name, x in tensors if not name.endswith(".num_batches_tracked")}


def _shapes(config: InceptionConfig, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, tuple]:
    """Returns the shapes of the file's tensors, given the shapes of our kernels."""
    shapes: dict[str, tuple] = {
        "fc.weight": (NUM_CLASSES, config.num_features),
        "fc.bias": (NUM_CLASSES,),
    }
    for name, (height, width, inputs, outputs) in kernels.items():
        theirs = _theirs(name)
        shapes[f"{theirs}.conv.weight"] = (outputs, inputs, height, width)
        shapes |= {f"{theirs}.bn.{kind}": (outputs,) for kind in BATCH_NORM_TENSORS}
    return shapes


def _theirs(name: str) -> str:
    """Returns PyTorch's name of a convolution with its norm.

    mixed_5b/branch1x1 is ``Mixed_5b.branch1x1``.
    """
    return name.capitalize().replace("/", ".")
