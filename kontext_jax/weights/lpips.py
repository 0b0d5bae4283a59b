"""LPIPS's weights: a trunk of torchvision's, and the heads of the package ``lpips``.

Trunks are trained on ImageNet: https://download.pytorch.org/models/ has alexnet-owt-7be5be79.pth
(244 MB) and vgg16-397923af.pth (553 MB), whose classifiers LPIPS does without. The heads, a few KB,
are part of the package (BSD-2-Clause), which is neither imported nor otherwise needed.
"""

import importlib.util
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from kontext_jax.models.lpips import TRUNKS, Lpips, LpipsConfig
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import lay_out, read_file

PACKAGE = "lpips"

URL = "https://download.pytorch.org/models/"
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


def load_lpips(backbone: str | Path, heads: str | Path, net: str, mesh: Mesh) -> Lpips:
    """LPIPS with the weights of two files, computed in float32.

    Args:
      backbone: torchvision's AlexNet or VGG16, .safetensors or any file of ``torch.save``: tensors
        ``features.{i}.weight`` and ``features.{i}.bias``. Those of the classifier are left.
      heads: the package's ``weights/v0.1/{net}.pth``, or a file of any such kind, with tensors
        ``lin{i}.model.1.weight``; if empty, the installed package's.
      net: "alex" or "vgg".
      mesh: where it goes.

    Raises:
      FileNotFoundError: there is no such file, or the package is not installed.
      ValueError: there is no such ``net``.
      WeightsError: a file cannot be read, or the two do not fit; it names every tensor that is
        missing, not wanted or of another shape.
    """
    config = LpipsConfig(net=net)
    if not Path(backbone).is_file():
        raise FileNotFoundError(
            f"There is no file {str(backbone)!r} with LPIPS's trunk: download {URL}{BACKBONES[net]}"
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
    wrong += [f"{name} is not wanted" for name in sorted(tensors.keys() - shapes.keys())]
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
    return lay_out(abstract, arrays, mesh)


def _installed_heads(net: str) -> Path:
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise FileNotFoundError(
            "LPIPS's heads are not installed: pip install --no-deps lpips==0.1.4, or give the path "
            f"of its weights/v0.1/{net}.pth."
        )
    return Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / f"{net}.pth"


def _names(net: str) -> dict[str, str]:
    """Of each of our parameters, PyTorch's; its layers count pools and ReLUs too."""
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
    """Of a tensor of PyTorch's: a head is a convolution of one pixel there."""
    if name.startswith("lin"):
        return (1, *ours, 1, 1)
    return tuple(ours[axis] for axis in (3, 2, 0, 1)) if len(ours) == 4 else ours
