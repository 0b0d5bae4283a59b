"""Low-rank adapters (LoRA, arXiv 2106.09685): a mask over the same model, not a second model.

Adapters are a plain dict from the path of a `Linear` to its `LowRank`, of their own and small::

    adapters = init(network, config, key)   # what is trained, saved and sharded
    attach(network, adapters)               # the model to call, within jit and grad too
    merge(network, adapters)                # a plain model of the same function

A path names a module as checkpoints name its arrays: ``double_blocks/img_attn/qkv``. The blocks of
a stack share a path, and their adapters are stacked like their kernels.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from kontext_jax.models.layers import Linear, LowRank, stack
from kontext_jax.settings import Settings

Adapters = dict[str, LowRank]
"""Path of a linear map -> its adapter."""


@dataclass(kw_only=True, unsafe_hash=True)
class LoraConfig(Settings):
    """Which linear maps are adapted, and how much.

    The default targets are those of diffusers' ``train_dreambooth_lora_flux_kontext.py``:
    attention and MLP of both streams and, of single blocks, q, k, v and the MLP's input. Here
    these maps are fused: where diffusers has three adapters for q, k and v (four with the MLP's
    input), there is one, of one rank.

    Attributes:
      rank: of each adapter's product of matrices; 0 = no adapters.
      alpha: adapters are scaled by alpha / rank; 0 = the rank, which is a scale of 1.
      targets: glob patterns of paths; ``*`` matches "/" too.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = (
        "double_blocks/*_attn/qkv",
        "double_blocks/*_attn/proj",
        "double_blocks/*_mlp/in_layer",
        "double_blocks/*_mlp/out_layer",
        "single_blocks/linear1",
    )

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} must be 0 (no adapters) or more.")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha} must be 0 (the rank) or a finite number above.")
        if self.rank and not self.targets:
            raise ValueError(f"targets must name what adapters of rank {self.rank} are for.")

    @property
    def scale(self) -> float:
        """The factor of the adapters' product."""
        return self.alpha / self.rank if self.rank and self.alpha else 1.0


def init(network: Any, config: LoraConfig, key: Key[Array, ""]) -> Adapters:
    """New adapters for every linear map that a target matches; they change nothing yet.

    Args:
      network: a module or a dict of them; shapes suffice (`jax.eval_shape`).
      config: without a rank there are no adapters: the dict is empty.
      key: of the random numbers.

    Raises:
      ValueError: a target matches nothing, or the network has adapters.
    """
    if not config.rank:
        return {}
    linears = _linears(network)
    chosen = set()
    for target in config.targets:
        matches = [path for path in linears if fnmatch.fnmatchcase(path, target)]
        if not matches:
            raise ValueError(
                f"Target {target!r} matches no linear map; there are {_some(linears)}."
            )
        chosen.update(matches)
    rngs = nnx.Rngs(key)

    def make(kernel: nnx.Param) -> LowRank:
        in_features, out_features = kernel.shape[-2:]
        axes = kernel.get_metadata()["axes"]

        def adapter(rngs):
            return LowRank(
                in_features, out_features, config.rank, axes, rngs=rngs, scale=config.scale
            )

        return adapter(rngs) if len(kernel.shape) == 2 else stack(adapter, kernel.shape[0], rngs)

    return {path: make(linears[path].kernel) for path in sorted(chosen)}


def attach(network: Any, adapters: Adapters) -> Any:
    """A copy of ``network`` in which ``adapters`` are at work.

    Raises:
      ValueError: an adapter's path or shape is not the network's, or the network has adapters.
    """
    network, adapters = _copy(network), _copy(adapters)
    for linear, adapter in _pairs(network, adapters):
        linear.lora = nnx.data(adapter)
    return network


def merge(network: Any, adapters: Adapters) -> Any:
    """A copy of ``network`` with ``adapters`` added to its kernels in float32: a plain model.

    Raises:
      ValueError: an adapter's path or shape is not the network's, or the network has adapters.
    """
    network = _copy(network)
    for linear, adapter in _pairs(network, adapters):
        kernel = linear.kernel[...]
        product = jnp.matmul(adapter.a[...], adapter.b[...], precision="highest")
        merged = kernel.astype(jnp.float32) + adapter.scale * product
        linear.kernel[...] = merged.astype(kernel.dtype)
    return network


def _copy(tree):
    """The same arrays in new modules, which belong to the caller's trace and can be changed."""
    return jax.tree.map(lambda x: x, tree)


def _linears(network) -> dict[str, Linear]:
    """The linear maps by their paths."""
    nodes = jax.tree_util.tree_leaves_with_path(network, is_leaf=lambda x: isinstance(x, Linear))
    linears = {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in nodes
        if isinstance(node, Linear)
    }
    taken = [path for path, linear in linears.items() if linear.lora is not None]
    if taken:
        raise ValueError(f"The network has adapters already: {_some(taken)}.")
    return linears


def _pairs(network, adapters: Adapters) -> list[tuple[Linear, LowRank]]:
    """The linear maps of ``network`` that have an adapter, each with it."""
    linears = _linears(network)
    for path, adapter in adapters.items():
        if path not in linears:
            raise ValueError(
                f"The network has no linear map {path!r} to adapt; there are {_some(linears)}."
            )
        *layers, in_features, out_features = linears[path].kernel.shape
        rank = adapter.a.shape[-1]
        fitting = (*layers, in_features, rank), (*layers, rank, out_features)
        if (adapter.a.shape, adapter.b.shape) != fitting:
            raise ValueError(
                f"The adapter of {path!r}, a {adapter.a.shape} and b {adapter.b.shape}, does not "
                f"fit its kernel {linears[path].kernel.shape}."
            )
    return [(linears[path], adapter) for path, adapter in adapters.items()]


def _some(paths) -> str:
    names = sorted(paths)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
