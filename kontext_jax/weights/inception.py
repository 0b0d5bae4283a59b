"""The weights of FID's InceptionV3, as mseitzer/pytorch-fid brought them from TensorFlow.

They are read from a local file and never downloaded: the one at ``URL``, or the same tensors as
safetensors. Only a Frechet distance of these weights' features may be called FID, and only of the
file at ``URL`` is it known whose they are (`is_fid`): of any other, a copy as safetensors too, it
is called ``fd_inception``.
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
from kontext_jax.weights.loading import NORM, lay_out, read_file, with_norm

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)

FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file at ``URL``, 95,628,359 bytes."""

NUM_CLASSES = 1008
"""Of the classifier, which is checked for and not kept: 1,000 and some without a meaning."""

EPSILON = 1e-3
"""Of the batch norms."""


def load_inception(path: Path, mesh: Mesh, config: InceptionConfig | None = None) -> Inception:
    """FID's network from a .pth file of pytorch-fid, or a .safetensors file with its names.

    Each convolution takes its batch norm in.

    Args:
      path: of the file.
      config: the network of the file, and how it is computed; FID's if left out.

    Raises:
      FileNotFoundError: there is no such file; it says where to get it.
      WeightsError: the file cannot be read or does not fit; it names every tensor that is missing,
        not wanted, or of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; FID's network can be downloaded from {URL}")
    config = config or InceptionConfig()
    abstract = nnx.eval_shape(lambda: Inception(config, rngs=nnx.Rngs(0)))
    params = named_leaves(abstract)
    convolutions = [name.removesuffix("/kernel") for name in params if name.endswith("/kernel")]
    tensors = _read(path)
    wanted = _shapes(config, {name: params[f"{name}/kernel"].shape for name in convolutions})
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - tensors.keys())]
    for name, tensor in sorted(tensors.items()):
        if name not in wanted:
            wrong.append(f"{name} is not wanted")
        elif tensor.shape != wanted[name]:
            wrong.append(f"{name} is {tensor.shape}, not {wanted[name]}")
    if wrong:
        raise WeightsError(f"{path} does not fit FID's network: {'; '.join(wrong)}.")
    arrays = {}
    for name in convolutions:
        weight = tensors[f"{_theirs(name)}.conv.weight"]
        norm = [tensors[f"{_theirs(name)}.bn.{kind}"] for kind in NORM]
        arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = with_norm(weight, norm, EPSILON)
    return lay_out(abstract, arrays, mesh)


def is_fid(path: Path) -> bool:
    """Whether a file is the one at ``URL``, byte for byte."""
    return sha256_of(path) == FID_SHA256


def _read(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors, less the norms' counts of batches, which serve training alone."""
    tensors = read_file(path).items()
    return {name: x for name, x in tensors if not name.endswith(".num_batches_tracked")}


def _shapes(config: InceptionConfig, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, tuple]:
    """Of the file's tensors, by name; ``kernels`` are those of our convolutions."""
    shapes: dict[str, tuple] = {
        "fc.weight": (NUM_CLASSES, config.num_features),
        "fc.bias": (NUM_CLASSES,),
    }
    for name, (height, width, inputs, outputs) in kernels.items():
        theirs = _theirs(name)
        shapes[f"{theirs}.conv.weight"] = (outputs, inputs, height, width)
        shapes |= {f"{theirs}.bn.{kind}": (outputs,) for kind in NORM}
    return shapes


def _theirs(name: str) -> str:
    """PyTorch's name of a convolution with its norm: ``Mixed_5b.branch1x1`` of mixed_5b/branch1x1.

    Ours are the same, in small letters.
    """
    return name.capitalize().replace("/", ".")
