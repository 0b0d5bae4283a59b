"""Our side of the comparison: networks loaded from files as users load them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.flux import Flux
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.weights import loading
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader, open_folder
from tests.parity.draws import PADDING, Example


def load(folder: Path, kind: str, **settings: Any):
    """Loads a network computed in float32 by default; ``settings`` override its config."""
    reader = open_folder(folder)
    config = dataclasses.replace(
        reader.config, **({"dtype": "float32", "remat": "none"} | settings)
    )
    return loading.load(reader, config, make_mesh(MeshConfig(), jax.devices()[:1]))


def tensors(module, kind: str) -> dict[str, np.ndarray]:
    """Returns a network, or its gradient, as tensors with PyTorch's names and layout."""
    network, reader = NETWORKS[kind], ArrayReader(NETWORKS[kind], module)
    return {
        piece.name: piece.to_tensor(reader.read(key))
        for key, pieces in network.table(module.config, "diffusers").pieces.items()
        for piece in pieces
    }


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """Packs examples into one row with padding at the end."""

    def concatenate(arrays) -> jax.Array:
        arrays = [np.asarray(array) for array in arrays]
        padding = np.zeros((PADDING, *arrays[0].shape[1:]), arrays[0].dtype)
        return jnp.asarray(np.concatenate([*arrays, padding]))[None]

    def segments(field: str) -> jax.Array:
        numbered = enumerate(examples, start=1)
        return concatenate(np.full(len(getattr(x, field)), i, np.int32) for i, x in numbered)

    return {
        "latents": concatenate(x.latents for x in examples),
        "text": concatenate(x.text for x in examples),
        "pooled": jnp.stack([jnp.asarray(x.pooled) for x in examples])[None],
        "t": jnp.stack([x.t for x in examples])[None],
        "guidance": jnp.stack([x.guidance for x in examples])[None],
        "positions": concatenate(x.positions for x in examples),
        "segments": segments("latents"),
        "text_segments": segments("text"),
    }


def is_target(examples: Sequence[Example]) -> np.ndarray:
    """Returns a mask of the packed row that is True for tokens of targets."""
    flags = [np.arange(len(x.latents)) < len(x.velocity) for x in examples]
    return np.concatenate([*flags, np.zeros(PADDING, bool)])


@jax.jit
def _velocity(model: Flux, row: dict[str, Any]) -> jax.Array:
    if not model.config.guidance_embed:
        row = row | {"guidance": None}
    return model(**row)[0]


def velocity(model: Flux, examples: Sequence[Example]) -> np.ndarray:
    """Returns the velocity of the targets' tokens, in the order of the examples."""
    return np.asarray(_velocity(model, pack(examples)))[is_target(examples)]


@jax.jit
def _loss_and_grad(model: Flux, row, tokens, target):
    def loss(model):
        out = _velocity(model, row)[tokens]
        return jnp.mean(jnp.square(out - target)), out

    return jax.value_and_grad(loss, has_aux=True)(model)


def velocity_and_grad(model: Flux, examples: Sequence[Example]) -> tuple[np.ndarray, Flux]:
    """Returns `velocity`, and the gradient of its mean squared error by every parameter."""
    target = jnp.asarray(np.concatenate([x.velocity for x in examples]))
    tokens = jnp.asarray(np.flatnonzero(is_target(examples)))
    (_, out), grads = _loss_and_grad(model, pack(examples), tokens, target)
    return np.asarray(out), grads
