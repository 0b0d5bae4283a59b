"""Opening what a run left behind: its config and its networks."""

import dataclasses
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from kontext_jax.checkpoint import Checkpointer
from kontext_jax.config import Config, from_dict
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.sharding import shardings_of


def load_meta(workdir: str | Path) -> dict[str, Any]:
    """Config, metrics and frozen networks that the run's latest checkpoint tells of.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    with closing(_open(workdir)) as checkpointer:
        return checkpointer.meta()


def load_config(workdir: str | Path) -> Config:
    """The resolved config of the run's latest checkpoint.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    return from_dict(load_meta(workdir)["config"])


def load_player(workdir: str | Path, player: str, mesh: Mesh, params: str = "ema"):
    """(network, config) of one player, laid out over the mesh.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trained something else.
    """
    config = load_config(workdir)
    objective = config.make_objective()
    if player not in objective.players:
        raise ValueError(
            f"{workdir} is a run of {config.objective.kind}, which trains "
            f"{', '.join(objective.players)} and no {player}."
        )
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))[player]
    shardings = shardings_of(abstract, mesh)
    with closing(_open(workdir)) as checkpointer:
        network = checkpointer.restore_network(player, abstract, shardings, params)
    return network, config


def load_autoencoder(workdir: str | Path, mesh: Mesh) -> Autoencoder:
    """The autoencoder of a run, scaled so that its latents have mean 0 and variance 1.

    FLUX's own constants (0.3611, 0.1159) are this statistic of its own autoencoder; here it is
    what the run last measured on its training images.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trained something else, or has not measured its latents.
    """
    network, config = load_player(workdir, "autoencoder", mesh)
    metrics = load_meta(workdir)["metrics"]
    mean = metrics.get("autoencoder/latent_mean", math.nan)
    variance = metrics.get("autoencoder/latent_square", math.nan) - mean**2
    if not variance > 0:
        raise ValueError(
            f"The checkpoint of {workdir} was saved without the statistics of its latents; train "
            "it to its next line of the log."
        )
    scaled = dataclasses.replace(
        config.objective.autoencoder, scale_factor=1 / math.sqrt(variance), shift_factor=mean
    )
    _, state = nnx.split(network)  # what is left out holds the unscaled config
    autoencoder = nnx.eval_shape(lambda: Autoencoder(scaled, rngs=nnx.Rngs(0)))
    nnx.update(autoencoder, state)
    return autoencoder


def load_frozen(config: Config, mesh: Mesh, known: dict | None = None) -> dict[str, Autoencoder]:
    """The networks that a run uses and does not train, by name.

    Args:
      config: of the run.
      mesh: where they go.
      known: what `identity_of` said of them when the run used them last.

    Raises:
      FileNotFoundError: a run that one of them comes from is missing.
      ValueError: one does not fit the run, or is no longer what it was.
    """
    frozen = {}
    for name, run in config.make_objective().frozen().items():
        try:
            autoencoder = load_autoencoder(run, mesh)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"objective.{name}_from: {error}") from error
        _check_fit(autoencoder.config, config, run)
        frozen[name] = autoencoder
    if known is not None and known != identity_of(frozen):
        raise ValueError(
            f"{', '.join(frozen)}: trained on since this run used it, and its latents are others "
            "now. Keep the checkpoint that a run was made with."
        )
    return frozen


def identity_of(frozen: dict[str, Autoencoder]) -> dict[str, list[float]]:
    """What tells one state of frozen networks from another: the scale of the latents."""
    return {
        name: [network.config.scale_factor, network.config.shift_factor]
        for name, network in frozen.items()
    }


def _check_fit(autoencoder: AutoencoderConfig, config: Config, run: str) -> None:
    channels = config.objective.transformer.in_channels
    if autoencoder.token_channels != channels:
        raise ValueError(
            f"The autoencoder of {run} makes tokens of {autoencoder.token_channels} channels, the "
            f"transformer takes {channels}: set objective.transformer.in_channels."
        )
    side = config.data.geometry.pixels_per_token
    if autoencoder.pixels_per_token != side:
        raise ValueError(
            f"A token of the autoencoder of {run} is {autoencoder.pixels_per_token} pixels wide, "
            f"not {side}: set data.geometry.pixels_per_token."
        )


def _open(workdir: str | Path) -> Checkpointer:
    if not (Path(workdir) / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"There is no run with checkpoints in {str(workdir)!r}; train one with "
            "python -m kontext_jax.train --workdir=..."
        )
    return Checkpointer(Path(workdir))
