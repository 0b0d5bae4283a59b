"""Reads what is stored at a location: the checkpoints of a run, or weights in other layouts.

A *location* is one of

- the workdir of a run (``runs/flow`` for its latest checkpoint, ``runs/flow@5000`` for step 5000),
- a folder that ``kontext_jax.convert`` wrote,
- a diffusers pipeline, or the folder of one of its networks,
- a single file in Black Forest Labs' layout.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kontext_jax.config import Config
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.lora import Adapters
from kontext_jax.objectives import Network
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.settings import freeze, from_dict, to_dict
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.training.checkpoint import Checkpointer
from kontext_jax.weights import flux
from kontext_jax.weights.fingerprint import fingerprint, fingerprint_of
from kontext_jax.weights.loading import check_architecture
from kontext_jax.weights.lora import MergedReader
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.pipeline import BFL_FILES, TOKENIZERS, read_scheduler
from kontext_jax.weights.reading import (
    OrbaxReader,
    Reader,
    config_from_record,
    identify_network,
    matches,
    open_file,
    open_folder,
    read_config,
)

PARAMETER_SETS = ("ema", "params")
"""The parameters in a run's checkpoint: averaged, and as trained."""

DTYPE_SETTINGS = ("dtype", "timestep_dtype")
"""Settings of a network's computation that change its outputs."""


def load_meta(workdir: str | Path) -> dict[str, Any]:
    """Returns a checkpoint's metadata; a run's has its config, metrics and frozen networks.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    with closing(_open_checkpoints(workdir)) as checkpointer:
        return checkpointer.meta()


def load_config(workdir: str | Path) -> Config:
    """Returns the resolved config of a run's checkpoint, frozen.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the folder holds converted weights, not a run.
    """
    meta = load_meta(workdir)
    if "config" not in meta:
        raise ValueError(f"{workdir} holds converted weights, not a run: give a run's workdir.")
    return freeze(from_dict(meta["config"], Config))


def load_generator(workdir: str | Path, mesh: Mesh, params: str = "ema", dtype: str = ""):
    """Returns (networks by name, config) of the player that generates images.

    Args:
      workdir: location of a run.
      mesh: devices that the networks are laid out over.
      params: "ema" or "params".
      dtype: dtype of the computation; the run's own if empty.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run does not train a transformer.
    """
    config = load_config(workdir)
    if not isinstance(config.objective, NetworksConfig):
        raise ValueError(
            f"{workdir} is a run of {config.objective.kind}, which trains no transformer."
        )
    if dtype:
        config = freeze(dataclasses.replace(config, objective=computed_in(config.objective, dtype)))
    objective = config.make_objective()
    player = objective.generator
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))[player]
    shardings = shardings_of(abstract, mesh)
    with closing(_open_checkpoints(workdir)) as checkpointer:
        networks = checkpointer.restore_network(player, abstract, shardings, params)
    return networks, config


def computed_in(objective, dtype: str):
    """Returns the objective's config with every network but the autoencoder in ``dtype``."""
    networks = {
        name: dataclasses.replace(getattr(objective, name), dtype=dtype)
        for name in ("transformer", "text_encoder", "clip")
    }
    return dataclasses.replace(objective, **networks)


def open_network(
    location: str | Path, name: str, params: str = "ema", except_for: Sequence[str] = ()
) -> Reader:
    """Opens the weights of one network at a location; see `open_networks`.

    Raises:
      FileNotFoundError: there are no weights, or none of this network.
      ValueError: the weights are incomplete, damaged or inconsistent.
    """
    return open_networks(location, params, except_for, only=name)[name]


def open_networks(
    location: str | Path,
    params: str = "ema",
    except_for: Sequence[str] = (),
    only: str | None = None,
) -> dict[str, Reader]:
    """Opens the weights of every network at a location, including a run's frozen networks.

    Args:
      location: see the module's docstring.
      params: "ema" or "params"; applies to runs.
      except_for: patterns of tensors to skip, which may be missing.
      only: name of a single network to open; all if None.

    Raises:
      FileNotFoundError: there are no weights, or none of the network ``only``.
      ValueError: the weights are incomplete, damaged or inconsistent.
    """
    path = Path(location)
    names = _networks_at(path, except_for)
    if only is not None and only not in names:
        raise FileNotFoundError(f"There is no {only} in {location}; there is {', '.join(names)}.")
    return {
        name: _open_at(path, name, params, except_for)
        for name in (names if only is None else [only])
    }


def _networks_at(path: Path, except_for: Sequence[str]) -> list[str]:
    """Returns the names of the networks at a location."""
    if is_run(path):
        objective = load_config(path).make_objective()
        abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
        trained = [n for player in abstract for n in networks_by_name(abstract[player], player)]
        return [name for name in NETWORKS if name in {*trained, *objective.frozen()}]
    if (path / "checkpoints").is_dir():
        return list(load_meta(path)["networks"])
    if path.is_file():
        return [open_file(path, except_for).network.name]
    if (path / "config.json").is_file():
        return [identify_network(read_config(path), path).name]
    names = [
        network.name
        for network in NETWORKS.values()
        if _bfl_file(path, network.name) or (path / network.folder / "config.json").is_file()
    ]
    if not names:
        raise FileNotFoundError(
            f"There are no weights at {str(path)!r}: it is neither a run with checkpoints (train "
            "one with python -m kontext_jax.train --workdir=...), nor a folder in diffusers' "
            "layout, nor a .safetensors file."
        )
    return names


def _open_at(path: Path, name: str, params: str, except_for: Sequence[str]) -> Reader:
    if is_run(path):
        return _open_from_run(path, name, params)
    if (path / "checkpoints").is_dir():  # written by `weights.export.write_orbax`
        meta, network = load_meta(path), NETWORKS[name]
        config = config_from_record(network, meta["networks"][name])
        return OrbaxReader(_arrays(path, "params"), [name], network, config, meta["records"][name])
    if path.is_file():
        return open_file(path, except_for)
    if (path / "config.json").is_file():
        return open_folder(path, except_for)
    file = _bfl_file(path, name)
    reader = open_file(file, except_for) if file else None
    reader = reader or open_folder(path / NETWORKS[name].folder, except_for)
    if name == "transformer" and "time" not in reader.record and (path / "scheduler").is_dir():
        reader.record["time"] = to_dict(read_scheduler(path))
    return reader


def _bfl_file(folder: Path, name: str) -> Path | None:
    """Returns the network's file in a folder in BFL's layout, if it has one.

    Pipelines may also contain the file, but their own folders take precedence.
    """
    file = folder / BFL_FILES.get(name, "-")
    return file if file.is_file() and not (folder / "model_index.json").is_file() else None


def _open_from_run(workdir: Path, name: str, params: str) -> Reader:
    meta, arrays, network = load_meta(workdir), _arrays(workdir, params), NETWORKS[name]
    config = from_dict(meta["config"], Config)
    record = record_of(config, int(arrays.parent.name), params)
    if config.objective.kind == "autoencoder":
        scaled = _with_latent_scale(config.objective.autoencoder, meta, params, workdir)
        if params == "ema" and "latents" in meta:
            record["latents"] = meta["latents"]
        return OrbaxReader(arrays, [name], network, scaled, record)
    if name in config.make_objective().frozen():
        reader = open_init(config, name)
        if identity_of_reader(reader) != meta["frozen"][name]:
            raise ValueError(
                f"The {name} that {workdir} was trained with has changed: "
                f"{getattr(config.objective.init_from, network_of(name))} was trained further or "
                "replaced since. Restore its original weights."
            )
        if name != "transformer":
            return reader
        adapters, _, _ = load_adapters(workdir, params)
        return MergedReader(reader, adapters, record)
    path = [config.make_objective().generator, name]
    return OrbaxReader(arrays, path, network, getattr(config.objective, name), record)


def open_init(config: Config, name: str) -> Reader:
    """Opens the weights that a run's ``init_from`` names, and checks them against its config.

    Args:
      config: config of the run.
      name: name of a player's network or of a frozen network; ``init_from.transformer`` is the
        location of the teacher.

    Raises:
      FileNotFoundError: there are no such weights.
      ValueError: ``init_from`` does not name them, or they do not match the config.
    """
    init_from, network = config.objective.init_from, network_of(name)
    location = getattr(init_from, network)
    if not location:
        raise ValueError(
            f"objective.init_from.{network} is empty: set it to the location of this run's {name}."
        )
    try:
        reader = open_network(location, network, except_for=init_from.except_for)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"objective.init_from.{network}: {error}") from error
    if hasattr(config.objective, name):
        # In guidance distillation the student has the guidance input that its teacher lacks.
        teacher = getattr(config.objective, "teacher", None)
        adds_guidance = network == "transformer" and teacher != config.objective.transformer
        may_differ = adds_guidance or _skips_guidance(init_from.except_for)
        ignored = ("guidance_embed",) if may_differ else ()
        check_architecture(reader, getattr(config.objective, name), location, ignored)
    return reader


def network_of(role: str) -> str:
    """Returns the `NETWORKS` name of a trained or frozen network: the teacher is a transformer."""
    return "transformer" if role == "teacher" else role


def _skips_guidance(except_for: Sequence[str]) -> bool:
    """Whether the patterns match all tensors that [dev] has and [schnell] lacks, in one layout."""
    rows = [row for row in flux.rows(FluxConfig.dev()) if row.param.startswith("guidance_in")]
    layouts = ([row.bfl for row in rows], [row.diffusers for row in rows])
    return any(all(matches(name, except_for) for name in names) for names in layouts)


def load_adapters(
    workdir: str | Path, params: str = "ema"
) -> tuple[Adapters, FluxConfig, dict[str, Any]]:
    """Returns a run's trained adapters, the config of their transformer, and the run's record.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trains no adapters.
    """
    model, config = load_generator(workdir, make_mesh(MeshConfig()), params)
    if "lora" not in model:
        raise ValueError(f"{workdir} is a run without adapters (objective.lora.rank is 0).")
    adapters = jax.device_get(model["lora"])
    return adapters, config.objective.transformer, record_of(config, step_at(workdir), params)


def tokenizers_of(location: Path) -> dict[str, str]:
    """Returns the tokenizers at a location by text encoder: each a folder, or "byt5"."""
    if is_run(location):
        text = load_config(location).data.text
        sources = {"text_encoder": text.tokenizer, "clip": text.clip_tokenizer}
        return {name: source for name, source in sources.items() if source}
    folders = {name: location / folder for name, folder in TOKENIZERS.items()}
    return {name: str(folder) for name, folder in folders.items() if folder.is_dir()}


def identity_of_reader(reader: Reader) -> list:
    """Returns what identifies a network: its fingerprint, and an autoencoder's latent scale."""
    return [fingerprint_of(reader), *_latent_scale(reader.config)]


def identity_of(networks: dict[str, Network]) -> dict[str, list]:
    """Returns the identity of each network on devices, equal to its reader's."""
    return {name: [fingerprint(x), *_latent_scale(x.config)] for name, x in networks.items()}


def _latent_scale(config) -> list[float]:
    is_autoencoder = isinstance(config, AutoencoderConfig)
    return [config.scale_factor, config.shift_factor] if is_autoencoder else []


def usage_of(networks: dict[str, Network], objective) -> dict[str, str]:
    """Returns the settings, such as "teacher.dtype", that change what the same weights compute.

    Args:
      networks: frozen networks by name.
      objective: config that says how the teacher, if there is one, is conditioned.
    """
    usage = {
        f"{name}.{setting}": value
        for name, network in networks.items()
        for setting, value in _dtypes(network.config).items()
    }
    return usage | ({"pooled": objective.pooled} if "teacher" in networks else {})


def record_of(config: Config, step: int, params: str) -> dict[str, Any]:
    """Returns the record stored with a run's weights: their origin, and how to use them."""
    geometry = config.data.geometry
    record = {
        "step": step,
        "params": params,
        "position_scheme": geometry.position_scheme,
        "geometry": to_dict(geometry),
    }
    if isinstance(config.objective, NetworksConfig):
        record |= {
            "pooled": config.objective.pooled,
            "time": to_dict(config.objective.time),
            "text": config.data.text.lengths(),
            "compute": {
                name: _dtypes(getattr(config.objective, name))
                for name in ("transformer", "text_encoder", "clip")
            },
        }
    return record


def _dtypes(config) -> dict[str, str]:
    return {name: value for name, value in vars(config).items() if name in DTYPE_SETTINGS}


def is_run(location: str | Path) -> bool:
    """Whether training wrote the checkpoints at a location, and not ``convert``."""
    return (split_step(location)[0] / "checkpoints").is_dir() and "config" in load_meta(location)


def is_autoencoder(location: str | Path) -> bool:
    """Whether a location holds an autoencoder and no other network.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: they are damaged.
    """
    if is_run(location):
        return load_config(location).objective.kind == "autoencoder"
    return _networks_at(Path(location), ()) == ["autoencoder"]


def networks_by_name(player_tree, player: str) -> dict[str, Network]:
    """Returns a player's networks by name; a single network takes the name of its player."""
    return player_tree if isinstance(player_tree, dict) else {player: player_tree}


def _arrays(workdir: Path, params: str) -> Path:
    """Returns the folder of a checkpoint's arrays, within the folder named after its step."""
    with closing(_open_checkpoints(workdir)) as checkpointer:
        return checkpointer.folder / str(checkpointer.step()) / params


def _with_latent_scale(
    config: AutoencoderConfig, meta: dict[str, Any], params: str, workdir: Path
) -> AutoencoderConfig:
    """Returns the config with the scale and shift that give latents mean 0 and variance 1.

    The scale of the averaged parameters is measured when a checkpoint is saved, see
    `evaluation.latent_statistics`. That of the raw parameters, and of checkpoints from before this
    was measured, comes from the training log.
    """
    if params == "ema" and "latents" in meta:
        mean, square = meta["latents"]["mean"], meta["latents"]["square"]
    else:
        mean, square = (
            meta["metrics"].get(f"autoencoder/latent_{name}", math.nan)
            for name in ("mean", "square")
        )
    variance = square - mean**2
    if not variance > 0:
        raise ValueError(
            f"The checkpoint of {workdir} lacks the statistics of its latents: resume the run "
            "until it logs its metrics."
        )
    return dataclasses.replace(config, scale_factor=1 / math.sqrt(variance), shift_factor=mean)


def split_step(location: str | Path) -> tuple[Path, int | None]:
    """Splits a location into its path and its step, None if it names no step."""
    path, at, step = str(location).rpartition("@")
    if at and step.isdecimal() and not Path(location).exists():
        return Path(path), int(step)
    return Path(location), None


def steps_at(workdir: str | Path) -> list[int]:
    """Returns the steps of a run's stored checkpoints.

    Raises:
      FileNotFoundError: there are no checkpoints.
    """
    with closing(_open_checkpoints(workdir)) as checkpointer:
        return checkpointer.steps()


def step_at(location: str | Path) -> int:
    """Returns the step of the checkpoint that a run's location refers to.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    with closing(_open_checkpoints(location)) as checkpointer:
        return checkpointer.step()


def _open_checkpoints(location: str | Path) -> Checkpointer:
    workdir, step = split_step(location)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"There is no run with checkpoints in {str(workdir)!r}; train one with "
            "python -m kontext_jax.train --workdir=..."
        )
    return Checkpointer(workdir, step=step)
