"""LPIPS's weights: a trunk of torchvision and the heads of the package ``lpips``.

The trunks are trained on ImageNet: https://download.pytorch.org/models/ has
alexnet-owt-7be5be79.pth (244 MB) and vgg16-397923af.pth (553 MB), whose classifiers LPIPS does not
use. The heads, a few KB, are files of the package (BSD-2-Clause), which is not imported.
"""

import importlib.util
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from kontext_jax.models.lpips import TRUNKS, Lpips, LpipsConfig
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import network_from_arrays, read_file

PACKAGE = "lpips"

URL = "https://download.pytorch.org/models/"
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


def load_lpips(
    backbone: str | Path, heads: str | Path, net: str, mesh: Mesh, dtype: str = "float32"
) -> Lpips:
    """Loads LPIPS from two files.

    Args:
      backbone: torchvision's AlexNet or VGG16 as .safetensors or a file of ``torch.save``, with
        tensors ``features.{i}.weight`` and ``features.{i}.bias``; the classifier is ignored.
      heads: the package's ``weights/v0.1/{net}.pth`` or another file with tensors
        ``lin{i}.model.1.weight``; if empty, the installed package's.
      net: "alex" or "vgg".
      mesh: device mesh.
      dtype: compute dtype of the convolutions.

    Raises:
      FileNotFoundError: a file does not exist, or the package is not installed.
      ValueError: ``net`` is unknown.
      WeightsError: a file cannot be read or does not fit; the message names every tensor that is
        missing, unexpected or of another shape.
    """
    config = LpipsConfig(net=net, dtype=dtype)
    if not Path(backbone).is_file():
        raise FileNotFoundError(
            f"LPIPS's trunk {str(backbone)!r} does not exist; download {URL}{BACKBONES[net]}"
        )
    heads = heads or _installed_heads(net)
    tensors = {
        name: tensor
        for name, tensor in read_file(Path(backbone)).items()
        if not name.startswith("classifier.")
    }
    tensors |= read_file(Path(heads))

    abstract = nnx.eval_shape(lambda: Lpips(config, rngs=nnx.Rngs(0)))
    params, names = named_leaves(abstract), _names(net)
    shapes = {names[param]: _shape(names[param], leaf.shape) for param, leaf in params.items()}
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(tensors.keys() - shapes.keys())]
    wrong += [
        f"{name} is {tensors[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        raise WeightsError(f"{backbone} and {heads} do not fit LPIPS on {net}: {'; '.join(wrong)}.")

    arrays = {}
    for param, leaf in params.items():
        tensor = tensors[names[param]]
        arrays[param] = tensor.transpose(2, 3, 1, 0) if leaf.ndim == 4 else tensor.reshape(-1)
    return network_from_arrays(abstract, arrays, mesh)


def _installed_heads(net: str) -> Path:
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise FileNotFoundError(
            "LPIPS's heads are not installed: pip install --no-deps lpips==0.1.4, or pass the path "
            f"of its weights/v0.1/{net}.pth."
        )
    return Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / f"{net}.pth"


def _names(net: str) -> dict[str, str]:
    """Returns PyTorch's names by ours; PyTorch's layer indices count pools and ReLUs too."""
    names, layer = {}, 0
    for i, stage in enumerate(TRUNKS[net].stages):
        layer += stage.pool > 0
        for j in range(stage.num_convs):
            names[f"stages/{i}/{j}/kernel"] = f"features.{layer}.weight"
            names[f"stages/{i}/{j}/bias"] = f"features.{layer}.bias"
            layer += 2
        names[f"heads/{i}"] = f"lin{i}.model.1.weight"
    return names


def _shape(name: str, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of PyTorch's tensor, in which a head is a 1 x 1 convolution."""
    if name.startswith("lin"):
        return (1, *ours, 1, 1)
    return tuple(ours[axis] for axis in (3, 2, 0, 1)) if len(ours) == 4 else ours
