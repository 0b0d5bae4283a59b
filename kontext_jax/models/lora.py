"""Low-rank adapters (LoRA, arXiv 2106.09685): a mask over the same model, not a second model.

Adapters are a plain dict from the path of a `Linear` to its `LowRank`, separate from the model::

    adapters = init(network, config, key)   # trained, saved and sharded
    attach(network, adapters)               # the model with adapters, also within jit and grad
    merge(network, adapters)                # a model without adapters and with the same outputs

Paths follow the names of arrays in checkpoints: ``double_blocks/img_attn/qkv``. The blocks of a
stack share a path, and their adapters are stacked like their kernels.
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
    """Which linear maps have adapters, and their rank and scale.

    The default targets are those of diffusers' ``train_dreambooth_lora_flux_kontext.py``: attention
    and MLP of both streams of double blocks; q, k, v and the MLP's input of single blocks. Here
    these maps are fused, so one adapter stands for diffusers' three of q, k and v (four with the
    MLP's input).

    Attributes:
      rank: rank of each adapter; 0 = no adapters.
      alpha: adapters are scaled by alpha / rank; 0 = alpha equals the rank, a scale of 1.
      targets: glob patterns of paths; ``*`` also matches "/".
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
            raise ValueError(f"alpha {self.alpha} must be 0 (the rank) or positive and finite.")
        if self.rank and not self.targets:
            raise ValueError(f"targets is empty; adapters of rank {self.rank} need linear maps.")

    @property
    def scale(self) -> float:
        """Factor of the adapters' outputs."""
        return self.alpha / self.rank if self.rank and self.alpha else 1.0


def init(network: Any, config: LoraConfig, key: Key[Array, ""]) -> Adapters:
    """New adapters for every linear map that matches a target; their outputs are zero.

    Args:
      network: a module or a dict of modules; abstract arrays suffice (`jax.eval_shape`).
      config: targets, rank and scale; with rank 0 the result is empty.
      key: random key.

    Raises:
      ValueError: a target matches nothing, or the network already has adapters.
    """
    if not config.rank:
        return {}
    linears = _linears(network)
    chosen = set()
    for target in config.targets:
        matches = [path for path in linears if fnmatch.fnmatchcase(path, target)]
        if not matches:
            raise ValueError(
                f"Target {target!r} matches no linear map; choose from {_abbreviate(linears)}."
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
    """A copy of ``network`` with ``adapters`` applied.

    Raises:
      ValueError: an adapter does not fit the network, or the network already has adapters.
    """
    network, adapters = _copy(network), _copy(adapters)
    for linear, adapter in _pairs(network, adapters):
        linear.lora = nnx.data(adapter)
    return network


def merge(network: Any, adapters: Adapters) -> Any:
    """A copy of ``network`` with ``adapters`` merged into its kernels, computed in float32.

    Raises:
      ValueError: an adapter does not fit the network, or the network already has adapters.
    """
    network = _copy(network)
    for linear, adapter in _pairs(network, adapters):
        kernel = linear.kernel[...]
        product = jnp.matmul(adapter.a[...], adapter.b[...], precision="highest")
        merged = kernel.astype(jnp.float32) + adapter.scale * product
        linear.kernel[...] = merged.astype(kernel.dtype)
    return network


def _copy(tree):
    """New modules with the same arrays; they belong to the caller's trace and can be modified."""
    return jax.tree.map(lambda x: x, tree)


def _linears(network) -> dict[str, Linear]:
    """The linear maps by path.

    Raises:
      ValueError: the network already has adapters.
    """
    nodes = jax.tree_util.tree_leaves_with_path(network, is_leaf=lambda x: isinstance(x, Linear))
    linears = {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in nodes
        if isinstance(node, Linear)
    }
    adapted = [path for path, linear in linears.items() if linear.lora is not None]
    if adapted:
        raise ValueError(f"The network already has adapters: {_abbreviate(adapted)}.")
    return linears


def _pairs(network, adapters: Adapters) -> list[tuple[Linear, LowRank]]:
    """The linear maps of ``network`` that ``adapters`` adapt, each with its adapter."""
    linears = _linears(network)
    for path, adapter in adapters.items():
        if path not in linears:
            raise ValueError(
                f"The network has no linear map {path!r}; choose from {_abbreviate(linears)}."
            )
        *layers, in_features, out_features = linears[path].kernel.shape
        rank = adapter.a.shape[-1]
        shapes = (*layers, in_features, rank), (*layers, rank, out_features)
        if (adapter.a.shape, adapter.b.shape) != shapes:
            raise ValueError(
                f"The adapter of {path!r}, a {adapter.a.shape} and b {adapter.b.shape}, does not "
                f"fit its kernel {linears[path].kernel.shape}."
            )
    return [(linears[path], adapter) for path, adapter in adapters.items()]


def _abbreviate(paths) -> str:
    names = sorted(paths)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
