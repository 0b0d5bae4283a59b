"""Opening what a run left behind: its config and its networks."""

import dataclasses
import math
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from kontext_jax.checkpoint import Checkpointer
from kontext_jax.config import Config, from_dict
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.sharding import shardings_of


def load_config(workdir: str | Path) -> Config:
    """The resolved config of the run's latest checkpoint.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    return from_dict(_open(workdir).meta()["config"])


def load_player(workdir: str | Path, player: str, mesh: Mesh, params: str = "ema"):
    """(network, config) of one player, laid out over the mesh.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trained something else.
    """
    checkpointer = _open(workdir)
    config = from_dict(checkpointer.meta()["config"])
    objective = config.make_objective()
    if player not in objective.players:
        raise ValueError(
            f"{workdir} is a run of {config.objective.kind}, which trains "
            f"{', '.join(objective.players)} and no {player}."
        )
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))[player]
    network = checkpointer.restore_network(player, abstract, shardings_of(abstract, mesh), params)
    return network, config


def load_autoencoder(workdir: str | Path, mesh: Mesh) -> Autoencoder:
    """The autoencoder of a run, scaled so that its latents have mean 0 and variance 1.

    FLUX's own constants (0.3611, 0.1159) are this statistic of its own autoencoder; here it is
    what the run last measured on its training images.
    """
    network, config = load_player(workdir, "autoencoder", mesh)
    metrics = _open(workdir).meta()["metrics"]
    mean = metrics["autoencoder/latent_mean"]
    variance = metrics["autoencoder/latent_square"] - mean**2
    scaled = dataclasses.replace(
        config.objective.autoencoder, scale_factor=1 / math.sqrt(variance), shift_factor=mean
    )
    graph, state = nnx.split(network)
    del graph  # it holds the unscaled config
    abstract = nnx.eval_shape(lambda: Autoencoder(scaled, rngs=nnx.Rngs(0)))
    nnx.update(abstract, state)
    return abstract


def load_frozen(config: Config, mesh: Mesh) -> dict[str, Autoencoder]:
    """The networks that a run uses and does not train, by name.

    Raises:
      FileNotFoundError: a run that one of them comes from is missing.
      ValueError: one does not fit the run's transformer or geometry.
    """
    frozen = {}
    for name, run in config.make_objective().frozen().items():
        autoencoder = load_autoencoder(run, mesh)
        _check_fit(autoencoder.config, config, run)
        frozen[name] = autoencoder
    return frozen


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
