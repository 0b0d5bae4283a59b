"""Loads networks onto a mesh: a run's initial and frozen networks, and models for sampling."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kontext_jax.config import Config
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.loading.locations import (
    computed_in,
    identity_of,
    is_run,
    load_generator,
    load_meta,
    networks_by_name,
    open_init,
    open_network,
    open_networks,
)
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.lora import Adapters
from kontext_jax.models.lpips import Lpips
from kontext_jax.models.perceptual import FeatureDistance, PerceptualConfig, abstract_distance
from kontext_jax.objectives import Network
from kontext_jax.objectives.flow_matching import FlowMatchingConfig, networks_of
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.settings import from_dict
from kontext_jax.sharding import shardings_of
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.efficientnet import load_lite0
from kontext_jax.weights.fingerprint import fingerprint
from kontext_jax.weights.loading import load
from kontext_jax.weights.lora import read_lora
from kontext_jax.weights.lpips import load_lpips
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.pipeline import TOKENIZERS
from kontext_jax.weights.reading import Reader


class Model(NamedTuple):
    """Everything that sampling needs.

    Attributes:
      objective: configs of the networks, their conditioning and their schedule.
      data: image sizes and prompt lengths.
      networks: networks by name, see ``flow_matching.networks_of``.
      identity: what identifies the weights.
    """

    objective: NetworksConfig
    data: DataConfig
    networks: dict[str, Network]
    identity: dict[str, Any]


class AutoencoderModel(NamedTuple):
    """Everything that reconstructing needs.

    Attributes:
      autoencoder: the network, on the mesh.
      record: origin of the weights; "latents" are their statistics, if they were measured.
      identity: what identifies the weights.
    """

    autoencoder: Autoencoder
    record: dict[str, Any]
    identity: dict[str, Any]


def load_autoencoder(location: str | Path, mesh: Mesh, params: str = "ema") -> AutoencoderModel:
    """Loads the autoencoder at any location, also a pipeline's, laid out over the mesh.

    Args:
      location: see `loading.locations`.
      mesh: the mesh.
      params: "ema" or "params"; applies to runs.

    Raises:
      FileNotFoundError: there is no autoencoder at the location.
      ValueError: its weights are incomplete, damaged or inconsistent.
    """
    reader = open_network(location, "autoencoder", params)
    network = load(reader, reader.config, mesh, dtype=None)
    return AutoencoderModel(network, reader.record, identity_of({"autoencoder": network}))


def load_model(
    location: str | Path, mesh: Mesh, params: str = "ema", dtype: str = "", lora: str = ""
) -> Model:
    """Loads a complete model, laid out over the mesh.

    Args:
      location: a run that trains a transformer, or a complete pipeline in another layout.
      mesh: the mesh.
      params: "ema" or "params"; applies to runs.
      dtype: dtype that the transformer and the text encoders compute in; their own if empty.
      lora: adapters to apply, a file or folder in diffusers' layout.

    Raises:
      FileNotFoundError: there are no weights at the location, or a frozen network is missing.
      ValueError: the weights are of another kind, incomplete or inconsistent, or a frozen network
        has changed since the run used it.
    """
    if is_run(location):
        trained, config = load_generator(location, mesh, params, dtype)
        # Networks that only training needs, such as a teacher, are not among NETWORKS.
        needed = [name for name in config.make_objective().frozen() if name in NETWORKS]
        frozen = load_frozen(config, mesh, load_meta(location)["frozen"], needed)
        networks = frozen | trained
        objective, data = config.objective, config.data
    else:
        readers = open_networks(location, params)
        objective, data = _pipeline_settings(Path(location), readers)
        objective = computed_in(objective, dtype) if dtype else objective
        networks = {
            name: load(reader, getattr(objective, name, reader.config), mesh, dtype=None)
            for name, reader in readers.items()
        }
    if lora and "lora" in networks:
        raise ValueError(
            f"{location} already has adapters: merge them first, with kontext_jax.convert."
        )
    if lora:
        networks["lora"] = read_lora(Path(lora), objective.transformer)
    return Model(objective, data, networks_of(networks, {}), _identity(networks))


def _identity(networks: dict[str, Any]) -> dict[str, list]:
    adapters = networks.get("lora")
    identity = identity_of({name: x for name, x in networks.items() if name != "lora"})
    if adapters is not None:
        scales = sorted({adapter.scale for adapter in adapters.values()})
        identity["lora"] = [fingerprint(adapters), *scales]
    return identity


def load_frozen(
    config: Config,
    mesh: Mesh,
    expected: dict | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Network]:
    """Loads a run's frozen networks by name, in the dtypes they are stored in.

    Args:
      config: config of the run.
      mesh: the mesh.
      expected: identities that the run recorded (`identity_of`); not checked if None.
      only: names of the networks to load; all if None.

    Raises:
      FileNotFoundError: a network is missing.
      ValueError: a network does not fit the run, or has changed since the run recorded it.
    """
    frozen = {}
    for name in config.make_objective().frozen() if only is None else only:
        if name == "efficientnet":
            frozen[name] = load_lite0(mesh, config.objective.efficientnet)
            continue
        if name == "perceptual":
            frozen[name] = load_distance(config.objective.perceptual, mesh)
            continue
        reader = open_init(config, name)
        if name == "autoencoder":
            network_config = config.objective.frozen_autoencoder(reader.config)
            _check_autoencoder(network_config, config)
        else:
            network_config = getattr(config.objective, name)
        frozen[name] = load(reader, network_config, mesh, dtype=None)
    if expected is not None:
        changed = [n for n, identity in identity_of(frozen).items() if expected.get(n) != identity]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: trained further or replaced since this run used it. "
                "Restore the weights that the run was trained with."
            )
    return frozen


def load_distance(config: PerceptualConfig, mesh: Mesh) -> FeatureDistance | Lpips:
    """Loads a perceptual distance.

    Raises:
      FileNotFoundError: its weights are missing.
      WeightsError: they do not fit.
    """
    if config.network != "efficientnet":
        return load_lpips(config.trunk, config.heads, config.network, mesh, config.dtype)
    distance = abstract_distance(config)
    distance.network = load_lite0(mesh, config.network_config)
    return distance


def teacher_time(config: Config) -> TimeConfig:
    """Returns the teacher's schedule, from its run or pipeline; FLUX's if that records none."""
    return from_dict(open_init(config, "teacher").record.get("time", {}), TimeConfig)


def load_initial(config: Config, mesh: Mesh) -> dict[str, dict[str, Network]]:
    """Loads a run's initial networks, by player and name, in float32.

    Networks for which ``init_from`` names no location are left out.

    Raises:
      FileNotFoundError: a network is missing.
      ValueError: a network does not fit the run.
    """
    objective, init_from = config.make_objective(), config.objective.init_from
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    initial: dict[str, dict[str, Network]] = {}
    for player in objective.players:
        for name in networks_by_name(abstract[player], player):
            location = getattr(init_from, name, "")
            if not location:
                continue
            networks = initial.setdefault(player, {})
            if name == "lora":
                adapters = read_lora(Path(location), config.objective.transformer)
                networks[name] = _filled(adapters, _fresh(config, player, name, mesh), location)
                continue
            reader = open_init(config, name)
            network_config = getattr(config.objective, name)
            missing = set(NETWORKS[name].shapes(network_config)) - set(reader.dtypes)
            fresh = named_leaves(_fresh(config, player, name, mesh)) if missing else None
            networks[name] = load(reader, network_config, mesh, initial=fresh)
    return initial


def _fresh(config: Config, player: str, name: str, mesh: Mesh) -> Network:
    """Returns a network as a new run initialises it."""

    def init(key):
        return networks_by_name(config.make_objective().init(key)[player], player)[name]

    key = jax.random.key(config.seed)
    return jax.jit(init, out_shardings=shardings_of(jax.eval_shape(init, key), mesh))(key)


def _filled(stored: Adapters, fresh: Adapters, location: str) -> Adapters:
    """Returns fresh adapters, which add nothing, with stored ones in their first ranks.

    Files from other trainers may have separate adapters for q, k and v; together these have three
    times the rank.
    """
    misfits = [f"{path} is no target" for path in sorted(stored.keys() - fresh.keys())]
    misfits += [
        f"{path} has rank {adapter.a.shape[-1]}"
        for path, adapter in stored.items()
        if path in fresh and adapter.a.shape[-1] > fresh[path].a.shape[-1]
    ]
    if misfits:
        raise ValueError(
            f"The adapters in {location} do not fit those of objective.lora: "
            f"{'; '.join(misfits)}. Set its targets and rank accordingly."
        )
    filled = jax.tree.map(lambda x: x, fresh)
    for path, adapter in stored.items():
        rank, ratio = adapter.a.shape[-1], adapter.scale / fresh[path].scale
        filled[path].a[...] = fresh[path].a[...].at[..., :rank].set(adapter.a[...])
        filled[path].b[...] = fresh[path].b[...].at[..., :rank, :].set(ratio * adapter.b[...])
    return filled


def _pipeline_settings(
    location: Path, readers: dict[str, Reader]
) -> tuple[FlowMatchingConfig, DataConfig]:
    """Returns the settings to use a pipeline with: from its record, else FLUX's."""
    for name in ("transformer", "autoencoder", "text_encoder"):
        if name not in readers:
            raise ValueError(f"{location} holds no {name}; sampling needs a complete pipeline.")
    transformer, record = readers["transformer"].config, readers["transformer"].record
    pooled = record.get("pooled", "clip")
    if pooled == "clip" and "clip" not in readers:
        raise ValueError(f"{location} holds no clip; sampling needs a complete pipeline.")
    networks = {
        name: dataclasses.replace(readers[name].config, **record.get("compute", {}).get(name, {}))
        for name in ("transformer", "text_encoder", "clip")
        if name in readers
    }
    time = from_dict(record.get("time", {}), TimeConfig)
    objective = FlowMatchingConfig(**networks, pooled=pooled, time=time)
    autoencoder = readers["autoencoder"].config
    geometry = record.get("geometry") or {"pixels_per_token": autoencoder.pixels_per_token}
    # FLUX.1 [schnell], which has no guidance input, was trained with half as many text tokens.
    text = {
        "max_tokens": 512 if transformer.guidance_embed else 256,
        "clip_max_tokens": objective.clip.max_positions,
        "pad": True,
    }
    t5, clip = (location / TOKENIZERS[name] for name in ("text_encoder", "clip"))
    return objective, DataConfig(
        geometry=from_dict(geometry, GeometryConfig),
        text=TextConfig(
            tokenizer=str(t5),
            clip_tokenizer=str(clip) if pooled == "clip" else "",
            **(text | record.get("text", {})),
        ),
    )


def _check_autoencoder(autoencoder: AutoencoderConfig, config: Config) -> None:
    location = config.objective.init_from.autoencoder
    channels = config.objective.transformer.in_channels
    if autoencoder.token_channels != channels:
        raise ValueError(
            f"The tokens of the autoencoder in {location} have {autoencoder.token_channels} "
            f"channels, but the transformer takes {channels}: set "
            "objective.transformer.in_channels."
        )
    side = config.data.geometry.pixels_per_token
    if autoencoder.pixels_per_token != side:
        raise ValueError(
            f"The tokens of the autoencoder in {location} are {autoencoder.pixels_per_token} "
            f"pixels wide, not {side}: set data.geometry.pixels_per_token."
        )
