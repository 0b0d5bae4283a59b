"""Opening models: what a run left behind, and weights in the layouts of others.

A *place* is the workdir of a run, a folder that ``kontext_jax.convert`` made, a diffusers pipeline
or the folder of one of its networks, or a single file of Black Forest Labs' layout.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kontext_jax.checkpoint import Checkpointer
from kontext_jax.config import Config, from_dict, to_dict
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.lora import Adapters, attach
from kontext_jax.names import named_leaves
from kontext_jax.objectives import Network
from kontext_jax.objectives.flow_matching import FlowMatchingConfig, networks_of
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.weights.fingerprint import fingerprint
from kontext_jax.weights.loading import check_same, load
from kontext_jax.weights.lora import MergedReader, read_lora
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.pipeline import BFL_FILES, TOKENIZERS, time_of
from kontext_jax.weights.reading import (
    OrbaxReader,
    Reader,
    config_of,
    kind_of,
    open_file,
    open_folder,
    read_config,
)

PARAMS = ("ema", "params")
"""A run's averaged parameters, and those that it trains."""


class Model(NamedTuple):
    """All that sampling needs.

    Attributes:
      objective, data: the networks' configs, and the sizes, tokens and times they are used with.
      networks: by name, see ``flow_matching.networks_of``.
      identity: what tells the weights from others.
    """

    objective: FlowMatchingConfig
    data: DataConfig
    networks: dict[str, Network]
    identity: dict[str, Any]


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


def load_player(workdir: str | Path, player: str, mesh: Mesh, params: str = "ema", dtype: str = ""):
    """(network, config) of one player, laid out over the mesh; computed in ``dtype`` if given.

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
    if dtype:
        config.objective = _computed_in(config.objective, dtype)
        objective = config.make_objective()
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))[player]
    shardings = shardings_of(abstract, mesh)
    with closing(_open(workdir)) as checkpointer:
        network = checkpointer.restore_network(player, abstract, shardings, params)
    return network, config


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
    if _is_run(place):
        model, config = load_player(place, "model", mesh, params, dtype)
        frozen = load_frozen(config, mesh, load_meta(place)["frozen"])
        networks, objective, data = networks_of(model, frozen), config.objective, config.data
    else:
        readers = open_networks(place, params)
        objective, data = _settings(Path(place), readers)
        objective = _computed_in(objective, dtype) if dtype else objective
        networks = {
            name: load(reader, getattr(objective, name, reader.config), mesh, dtype=None)
            for name, reader in readers.items()
        }
    if lora:
        adapters = read_lora(Path(lora), objective.transformer)
        networks["transformer"] = attach(networks["transformer"], adapters)
    identity = {name: fingerprint(network) for name, network in networks.items()}
    return Model(objective, data, networks, identity)


def _computed_in(objective, dtype: str):
    """The objective's config with all but the autoencoder computed in ``dtype``."""
    networks = {
        name: dataclasses.replace(getattr(objective, name), dtype=dtype)
        for name in ("transformer", "text_encoder", "clip")
    }
    return dataclasses.replace(objective, **networks)


def load_frozen(config: Config, mesh: Mesh, known: dict | None = None) -> dict[str, Network]:
    """The networks that a run uses and does not train, by name, in the dtype they are stored in.

    Args:
      config: of the run.
      mesh: where they go.
      known: what `identity_of` said of them when the run used them last.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: one does not fit the run, or is no longer what it was.
    """
    frozen = {}
    for name in config.make_objective().frozen():
        reader = _open_init(config, name)
        if name == "autoencoder":
            network_config = reader.config
            _check_fit(network_config, config, config.objective.init_from.autoencoder)
        else:
            network_config = getattr(config.objective, name)
        frozen[name] = load(reader, network_config, mesh, dtype=None)
    if known is not None and known != identity_of(frozen):
        raise ValueError(
            f"{', '.join(frozen)}: trained on or replaced since this run used them. Keep the "
            "weights that a run was made with."
        )
    return frozen


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
        for name in _networks(abstract[player], player):
            place = getattr(init_from, name)
            if not place:
                continue
            given = initial.setdefault(player, {})
            if name == "lora":
                adapters = read_lora(Path(place), config.objective.transformer)
                given[name] = _fitting_adapters(adapters, abstract[player][name], place)
                continue
            reader = _open_init(config, name)
            missing = set(NETWORKS[name].shapes(reader.config)) - set(reader.dtypes)
            fresh = _fresh(config, player, name, missing) if missing else None
            given[name] = load(reader, getattr(config.objective, name), mesh, initial=fresh)
    return initial


def _networks(player_tree, player: str) -> dict[str, Network]:
    """The networks of a player by name; a player that is one network has the name of the player."""
    return player_tree if isinstance(player_tree, dict) else {player: player_tree}


def _fresh(config: Config, player: str, name: str, missing: set[str]) -> dict[str, jax.Array]:
    """What a new run would start these parameters from."""

    @jax.jit
    def make(key):
        network = _networks(config.make_objective().init(key)[player], player)[name]
        return {param: x for param, x in named_leaves(network).items() if param in missing}

    return make(jax.random.key(config.seed))


def _fitting_adapters(adapters, wanted, place: str):
    shapes, has = (
        {name: leaf.shape for name, leaf in named_leaves(tree).items()}
        for tree in (wanted, adapters)
    )
    scales, given = ({k: v.scale for k, v in tree.items()} for tree in (wanted, adapters))
    if shapes != has or scales != given:
        raise ValueError(
            f"The adapters in {place} are not those of objective.lora: set its rank, alpha and "
            "targets to theirs."
        )
    return adapters


def _open_init(config: Config, name: str) -> Reader:
    """The weights that ``init_from`` names for a network, checked against its config."""
    init_from = config.objective.init_from
    place = getattr(init_from, name)
    if not place:
        raise ValueError(
            f"objective.init_from.{name} is empty: this run needs the weights of its {name}."
        )
    try:
        reader = open_network(place, name, except_for=init_from.except_for)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"objective.init_from.{name}: {error}") from error
    if hasattr(config.objective, name):
        check_same(reader, getattr(config.objective, name), place)
    return reader


def identity_of(frozen: dict[str, Network]) -> dict[str, list]:
    """What tells one state of frozen networks from another: their values, the latents' scale."""
    identity = {name: [fingerprint(network)] for name, network in frozen.items()}
    if "autoencoder" in frozen:
        config = frozen["autoencoder"].config
        identity["autoencoder"] += [config.scale_factor, config.shift_factor]
    return identity


def open_network(
    place: str | Path, name: str, params: str = "ema", except_for: Sequence[str] = ()
) -> Reader:
    """One network's weights at a place.

    Raises:
      FileNotFoundError: there is nothing, or no such network.
      ValueError: the weights are not what they should be.
    """
    return open_networks(place, params, except_for, only=name)[name]


def open_networks(
    place: str | Path, params: str = "ema", except_for: Sequence[str] = (), only: str | None = None
) -> dict[str, Reader]:
    """The weights of every network at a place, those that a run only uses included.

    Args:
      place: see the module's docstring.
      params: "ema" or "params", of a run.
      except_for: patterns of tensors that may be missing, or are not to be read.
      only: the one network that is wanted.

    Raises:
      FileNotFoundError: there is nothing, or not the network that is wanted.
      ValueError: the weights are not what they should be.
    """
    path = Path(place)
    known = _networks_at(path)
    if only is not None and only not in known:
        raise FileNotFoundError(f"There is no {only} in {place}; there is {', '.join(known)}.")
    wanted = known if only is None else [only]
    return {name: _open_one(path, name, params, except_for) for name in wanted}


def _networks_at(path: Path) -> list[str]:
    """The names of the networks at a place."""
    if _is_run(path):
        objective = load_config(path).make_objective()
        abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
        trained = [n for player in abstract for n in _networks(abstract[player], player)]
        return [name for name in NETWORKS if name in {*trained, *objective.frozen()}]
    if (path / "checkpoints").is_dir():
        return list(load_meta(path)["networks"])
    if path.is_file():
        return [open_file(path).network.name]
    if (path / "config.json").is_file():
        return [kind_of(read_config(path), path).name]
    inside = [
        network.name
        for network in NETWORKS.values()
        if (path / BFL_FILES.get(network.name, "-")).is_file()
        or (path / network.folder / "config.json").is_file()
    ]
    if not inside:
        raise FileNotFoundError(
            f"There are no weights at {str(path)!r}: it is no run with checkpoints (train one: "
            "python -m kontext_jax.train --workdir=...), no folder of diffusers' layout, and no "
            ".safetensors file."
        )
    return inside


def _open_one(path: Path, name: str, params: str, except_for: Sequence[str]) -> Reader:
    if _is_run(path):
        return _open_from_run(path, name, params)
    if (path / "checkpoints").is_dir():  # what `weights.export.write_orbax` wrote
        meta, network = load_meta(path), NETWORKS[name]
        config = config_of(network, meta["networks"][name])
        return OrbaxReader(_item(path, "params"), [name], network, config, meta["records"][name])
    if path.is_file():
        return open_file(path, except_for)
    if (path / "config.json").is_file():
        return open_folder(path, except_for)
    file = path / BFL_FILES.get(name, "-")
    if file.is_file():
        return open_file(file, except_for)
    return open_folder(path / NETWORKS[name].folder, except_for)


def _open_from_run(workdir: Path, name: str, params: str) -> Reader:
    meta, item, network = load_meta(workdir), _item(workdir, params), NETWORKS[name]
    config = from_dict(meta["config"])
    record = record_of(config, int(item.parent.name), params)
    if config.objective.kind == "autoencoder":
        scaled = _scaled(config.objective.autoencoder, meta["metrics"], workdir)
        return OrbaxReader(item, [name], network, scaled, record)
    if name in config.make_objective().frozen():
        reader = _open_init(config, name)
        if name != "transformer":
            return reader
        adapters, _, _ = load_adapters(workdir, params)
        return MergedReader(reader, adapters, record)
    return OrbaxReader(item, ["model", name], network, getattr(config.objective, name), record)


def load_adapters(
    workdir: str | Path, params: str = "ema"
) -> tuple[Adapters, FluxConfig, dict[str, Any]]:
    """The adapters that a run trained, the config of their transformer, and the run's record.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trained none.
    """
    model, config = load_player(workdir, "model", make_mesh(MeshConfig()), params)
    if "lora" not in model:
        raise ValueError(f"{workdir} is a run without adapters (objective.lora.rank is 0).")
    step = int(_item(Path(workdir), params).parent.name)
    adapters = jax.device_get(model["lora"])
    return adapters, config.objective.transformer, record_of(config, step, params)


def tokenizers_of(place: Path) -> dict[str, str]:
    """The tokenizers at a place, by their text encoder: a folder, or "byt5"."""
    if _is_run(place):
        text = load_config(place).data.text
        known = {"text_encoder": text.tokenizer, "clip": text.clip_tokenizer}
        return {name: source for name, source in known.items() if source}
    folders = {name: place / folder for name, folder in TOKENIZERS.items()}
    return {name: str(folder) for name, folder in folders.items() if folder.is_dir()}


def _is_run(place: str | Path) -> bool:
    return (Path(place) / "checkpoints").is_dir() and "config" in load_meta(place)


def _item(folder: Path, name: str) -> Path:
    with closing(_open(folder)) as checkpointer:
        return checkpointer.folder / str(checkpointer.latest_step()) / name


def _scaled(config: AutoencoderConfig, metrics: dict[str, float], run: Path) -> AutoencoderConfig:
    """Such that latents have mean 0 and variance 1.

    FLUX's own constants (0.3611, 0.1159) are this statistic of its own autoencoder; here it is
    what the run last measured on its training images.
    """
    mean = metrics.get("autoencoder/latent_mean", math.nan)
    variance = metrics.get("autoencoder/latent_square", math.nan) - mean**2
    if not variance > 0:
        raise ValueError(
            f"The checkpoint of {run} was saved without the statistics of its latents; train it to "
            "its next line of the log."
        )
    return dataclasses.replace(config, scale_factor=1 / math.sqrt(variance), shift_factor=mean)


def record_of(config: Config, step: int, params: str) -> dict[str, Any]:
    """What travels with a run's weights: where they come from, and how they are to be used."""
    geometry = config.data.geometry
    record = {
        "step": step,
        "params": params,
        "position_scheme": geometry.position_scheme,
        "geometry": to_dict(geometry),
    }
    if config.objective.kind == "flow_matching":
        text = config.data.text
        record |= {
            "pooled": config.objective.pooled,
            "time": to_dict(config.objective.time),
            "text": {"max_tokens": text.max_tokens, "pad": text.pad},
        }
    return record


def _settings(place: Path, readers: dict[str, Reader]) -> tuple[FlowMatchingConfig, DataConfig]:
    """How a pipeline is to be used: what its record says, else FLUX's own way."""
    for name in ("transformer", "autoencoder", "text_encoder"):
        if name not in readers:
            raise ValueError(f"{place} holds no {name}; sampling needs a whole pipeline.")
    transformer, record = readers["transformer"].config, readers["transformer"].record
    pooled = record.get("pooled", "clip")
    if pooled == "clip" and "clip" not in readers:
        raise ValueError(f"{place} holds no clip; sampling needs a whole pipeline.")
    time = from_dict(record["time"], TimeConfig) if "time" in record else time_of(place)
    objective = FlowMatchingConfig(
        transformer=transformer,
        text_encoder=readers["text_encoder"].config,
        pooled=pooled,
        time=time,
        **({"clip": readers["clip"].config} if "clip" in readers else {}),
    )
    autoencoder = readers["autoencoder"].config
    geometry = record.get("geometry") or {"pixels_per_token": autoencoder.pixels_per_token}
    # FLUX.1 [schnell], without guidance, was trained with half the tokens.
    text = {"max_tokens": 512 if transformer.guidance_embed else 256, "pad": True}
    t5, clip = (place / TOKENIZERS[name] for name in ("text_encoder", "clip"))
    return objective, DataConfig(
        geometry=from_dict(geometry, GeometryConfig),
        text=TextConfig(
            tokenizer=str(t5),
            clip_tokenizer=str(clip) if pooled == "clip" else "",
            clip_max_tokens=objective.clip.max_positions,
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


def _open(workdir: str | Path) -> Checkpointer:
    if not (Path(workdir) / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"There is no run with checkpoints in {str(workdir)!r}; train one with "
            "python -m kontext_jax.train --workdir=..."
        )
    return Checkpointer(Path(workdir))
