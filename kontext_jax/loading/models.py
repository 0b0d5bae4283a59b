"""Networks on a mesh: what a run starts from, what it only uses, and all that sampling needs."""

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
    open_networks,
)
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.lora import Adapters
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
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.pipeline import TOKENIZERS
from kontext_jax.weights.reading import Reader


class Run(NamedTuple):
    """A run that makes pictures, on a mesh.

    Attributes:
      checkpoint: its workdir.
      config: it was trained with.
      trained: the networks of its generator, by name.
      frozen: the others that sampling needs.
    """

    checkpoint: str
    config: Config
    trained: dict[str, Network]
    frozen: dict[str, Network]

    @property
    def networks(self) -> dict[str, Network]:
        """All that a `Generator` takes."""
        return networks_of(self.trained, self.frozen)


class Model(NamedTuple):
    """All that sampling needs.

    Attributes:
      objective, data: the networks' configs, and the sizes, tokens and times they are used with.
      networks: by name, see ``flow_matching.networks_of``.
      identity: what tells the weights from others.
    """

    objective: NetworksConfig
    data: DataConfig
    networks: dict[str, Network]
    identity: dict[str, Any]


def load_run(checkpoint: str | Path, params: str, mesh: Mesh, dtype: str = "") -> Run:
    """A run's networks as its checkpoint has them; computed in ``dtype`` if given.

    Raises:
      FileNotFoundError: there is no checkpoint, or not what the run was made with.
      ValueError: the run trained nothing that makes pictures, or its frozen networks are others
        now.
    """
    trained, config = load_generator(checkpoint, mesh, params, dtype)
    frozen = load_frozen(config, mesh, load_meta(checkpoint)["frozen"], sampling_needs(config))
    return Run(str(checkpoint), config, trained, frozen)


def load_model(
    place: str | Path, mesh: Mesh, params: str = "ema", dtype: str = "", lora: str = ""
) -> Model:
    """The whole model at a place, laid out over the mesh.

    Args:
      place: a run of flow matching, or a whole pipeline in another layout.
      mesh: where it goes.
      params: "ema" or "params", of a run.
      dtype: to compute the transformer and the text encoders in; their own if left out.
      lora: adapters to put to work, a file or folder of diffusers' layout.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it is something else, incomplete, or not what it says.
    """
    if is_run(place):
        run = load_run(place, params, mesh, dtype)
        networks = run.frozen | run.trained
        objective, data = run.config.objective, run.config.data
    else:
        readers = open_networks(place, params)
        objective, data = _settings(Path(place), readers)
        objective = computed_in(objective, dtype) if dtype else objective
        networks = {
            name: load(reader, getattr(objective, name, reader.config), mesh, dtype=None)
            for name, reader in readers.items()
        }
    if lora and "lora" in networks:
        raise ValueError(f"{place} has adapters of its own; merge them first, by convert.")
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
    known: dict | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Network]:
    """The networks that a run uses and does not train, by name, in the dtype they are stored in.

    Args:
      config: of the run.
      mesh: where they go.
      known: what `identity_of` said of them when the run used them last.
      only: the names of those that are wanted; all if left out.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: one does not fit the run, or is no longer what it was.
    """
    frozen = {}
    for name in config.make_objective().frozen() if only is None else only:
        if name == "efficientnet":
            frozen[name] = load_lite0(mesh, config.objective.efficientnet)
            continue
        reader = open_init(config, name)
        if name == "autoencoder":
            network_config = reader.config
            _check_fit(network_config, config, config.objective.init_from.autoencoder)
        else:
            network_config = getattr(config.objective, name)
        frozen[name] = load(reader, network_config, mesh, dtype=None)
    now = identity_of(frozen)
    changed = [name for name in now if known is not None and known.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: trained on or replaced since this run used it. Keep the "
            "weights that a run was made with."
        )
    return frozen


def sampling_needs(config: Config) -> list[str]:
    """Which of a run's frozen networks make pictures, and do not only teach or look at them."""
    return [name for name in config.make_objective().frozen() if name in NETWORKS]


def teacher_time(config: Config) -> TimeConfig:
    """The teacher's own schedule: that of its run or pipeline, FLUX's if nothing tells of one."""
    return from_dict(open_init(config, "teacher").record.get("time", {}), TimeConfig)


def load_initial(config: Config, mesh: Mesh) -> dict[str, dict[str, Network]]:
    """The networks that a run starts from, by player and name, in float32.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: one does not fit the run.
    """
    objective, init_from = config.make_objective(), config.objective.init_from
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    initial: dict[str, dict[str, Network]] = {}
    for player in objective.players:
        for name in networks_by_name(abstract[player], player):
            place = getattr(init_from, name, "")
            if not place:
                continue
            given = initial.setdefault(player, {})
            if name == "lora":
                adapters = read_lora(Path(place), config.objective.transformer)
                given[name] = _filled(adapters, _fresh(config, player, name, mesh), place)
                continue
            reader = open_init(config, name)
            network_config = getattr(config.objective, name)
            missing = set(NETWORKS[name].shapes(network_config)) - set(reader.dtypes)
            fresh = named_leaves(_fresh(config, player, name, mesh)) if missing else None
            given[name] = load(reader, network_config, mesh, initial=fresh)
    return initial


def _fresh(config: Config, player: str, name: str, mesh: Mesh) -> Network:
    """What a new run would start a network from."""

    def make(key):
        return networks_by_name(config.make_objective().init(key)[player], player)[name]

    key = jax.random.key(config.seed)
    return jax.jit(make, out_shardings=shardings_of(jax.eval_shape(make, key), mesh))(key)


def _filled(stored: Adapters, fresh: Adapters, place: str) -> Adapters:
    """Fresh adapters, which add nothing, with stored ones in their first ranks.

    Files of others have ranks of their own for q, k and v, three times as many together.
    """
    wrong = [f"{path} is no target" for path in sorted(stored.keys() - fresh.keys())]
    wrong += [
        f"{path} has rank {adapter.a.shape[-1]}"
        for path, adapter in stored.items()
        if path in fresh and adapter.a.shape[-1] > fresh[path].a.shape[-1]
    ]
    if wrong:
        raise ValueError(
            f"The adapters in {place} do not go into those of objective.lora: {'; '.join(wrong)}. "
            "Set its targets and rank accordingly."
        )
    filled = jax.tree.map(lambda x: x, fresh)
    for path, adapter in stored.items():
        rank, ratio = adapter.a.shape[-1], adapter.scale / fresh[path].scale
        filled[path].a[...] = fresh[path].a[...].at[..., :rank].set(adapter.a[...])
        filled[path].b[...] = fresh[path].b[...].at[..., :rank, :].set(ratio * adapter.b[...])
    return filled


def _settings(place: Path, readers: dict[str, Reader]) -> tuple[FlowMatchingConfig, DataConfig]:
    """How a pipeline is to be used: what its record says, else FLUX's own way."""
    for name in ("transformer", "autoencoder", "text_encoder"):
        if name not in readers:
            raise ValueError(f"{place} holds no {name}; sampling needs a whole pipeline.")
    transformer, record = readers["transformer"].config, readers["transformer"].record
    pooled = record.get("pooled", "clip")
    if pooled == "clip" and "clip" not in readers:
        raise ValueError(f"{place} holds no clip; sampling needs a whole pipeline.")
    networks = {
        name: dataclasses.replace(readers[name].config, **record.get("compute", {}).get(name, {}))
        for name in ("transformer", "text_encoder", "clip")
        if name in readers
    }
    time = from_dict(record.get("time", {}), TimeConfig)
    objective = FlowMatchingConfig(**networks, pooled=pooled, time=time)
    autoencoder = readers["autoencoder"].config
    geometry = record.get("geometry") or {"pixels_per_token": autoencoder.pixels_per_token}
    # FLUX.1 [schnell], without guidance, was trained with half the tokens.
    text = {
        "max_tokens": 512 if transformer.guidance_embed else 256,
        "clip_max_tokens": objective.clip.max_positions,
        "pad": True,
    }
    t5, clip = (place / TOKENIZERS[name] for name in ("text_encoder", "clip"))
    return objective, DataConfig(
        geometry=from_dict(geometry, GeometryConfig),
        text=TextConfig(
            tokenizer=str(t5),
            clip_tokenizer=str(clip) if pooled == "clip" else "",
            **(text | record.get("text", {})),
        ),
    )


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
