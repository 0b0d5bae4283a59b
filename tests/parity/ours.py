"""Our side of the comparison: networks of files, read as users' files are."""

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
    """The network of the folder, computed in float32 unless ``settings`` say otherwise."""
    reader = open_folder(folder)
    config = dataclasses.replace(
        reader.config, **({"dtype": "float32", "remat": "none"} | settings)
    )
    return loading.load(reader, config, make_mesh(MeshConfig(), jax.devices()[:1]))


def tensors(module, kind: str) -> dict[str, np.ndarray]:
    """A network, or its gradient, under PyTorch's names and in its layout."""
    network, reader = NETWORKS[kind], ArrayReader(NETWORKS[kind], module)
    places = network.table(module.config, "diffusers").pieces
    return {
        piece.name: piece.to_tensor(reader.read(place))
        for place, pieces in places.items()
        for piece in pieces
    }


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """One row of all examples one after the other, with padding behind them."""

    def joined(arrays) -> jax.Array:
        arrays = [np.asarray(array) for array in arrays]
        filling = np.zeros((PADDING, *arrays[0].shape[1:]), arrays[0].dtype)
        return jnp.asarray(np.concatenate([*arrays, filling]))[None]

    def segments(of: str) -> jax.Array:
        numbered = enumerate(examples, start=1)
        return joined(np.full(len(getattr(x, of)), i, np.int32) for i, x in numbered)

    return {
        "latents": joined(x.latents for x in examples),
        "text": joined(x.text for x in examples),
        "pooled": jnp.stack([jnp.asarray(x.pooled) for x in examples])[None],
        "t": jnp.stack([x.t for x in examples])[None],
        "guidance": jnp.stack([x.guidance for x in examples])[None],
        "positions": joined(x.positions for x in examples),
        "segments": segments("latents"),
        "text_segments": segments("text"),
    }


def is_target(examples: Sequence[Example]) -> np.ndarray:
    """Which tokens of the packed row are to be made."""
    flags = [np.arange(len(x.latents)) < len(x.velocity) for x in examples]
    return np.concatenate([*flags, np.zeros(PADDING, bool)])


@jax.jit
def _velocity(model: Flux, row: dict[str, Any]) -> jax.Array:
    if not model.config.guidance_embed:
        row = row | {"guidance": None}
    return model(**row)[0]


def velocity(model: Flux, examples: Sequence[Example]) -> np.ndarray:
    """Of the targets' tokens, example after example."""
    return np.asarray(_velocity(model, pack(examples)))[is_target(examples)]


@jax.jit
def _loss_and_grad(model: Flux, row, tokens, wanted):
    def loss(model):
        out = _velocity(model, row)[tokens]
        return jnp.mean(jnp.square(out - wanted)), out

    return jax.value_and_grad(loss, has_aux=True)(model)


def velocity_and_grad(model: Flux, examples: Sequence[Example]) -> tuple[np.ndarray, Flux]:
    """As `velocity`; and every parameter's gradient of the mean square error of the targets."""
    wanted = jnp.asarray(np.concatenate([x.velocity for x in examples]))
    tokens = jnp.asarray(np.flatnonzero(is_target(examples)))
    (_, out), grads = _loss_and_grad(model, pack(examples), tokens, wanted)
    return np.asarray(out), grads
