"""What is stored at a place: a run's checkpoints, and weights in the layouts of others.

A *place* is the workdir of a run (``runs/flow`` for its latest checkpoint, ``runs/flow@5000`` for
that of a step), a folder that ``kontext_jax.convert`` made, a diffusers pipeline or the folder of
one of its networks, or a single file of Black Forest Labs' layout.
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
from kontext_jax.settings import from_dict, to_dict
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.training.checkpoint import Checkpointer
from kontext_jax.weights import flux
from kontext_jax.weights.fingerprint import fingerprint, fingerprint_of
from kontext_jax.weights.loading import check_same
from kontext_jax.weights.lora import MergedReader
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.pipeline import BFL_FILES, TOKENIZERS, time_of
from kontext_jax.weights.reading import (
    OrbaxReader,
    Reader,
    config_of,
    kind_of,
    matches,
    open_file,
    open_folder,
    read_config,
)

PARAMETER_SETS = ("ema", "params")
"""A run's averaged parameters, and those that it trains."""

DTYPE_SETTINGS = ("dtype", "timestep_dtype")
"""Settings of how networks are computed that change what comes out."""


def load_meta(workdir: str | Path) -> dict[str, Any]:
    """Config, metrics and frozen networks that the run's checkpoint tells of.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    with closing(_open(workdir)) as checkpointer:
        return checkpointer.meta()


def load_config(workdir: str | Path) -> Config:
    """The resolved config of the run's checkpoint.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: training has not made it.
    """
    meta = load_meta(workdir)
    if "config" not in meta:
        raise ValueError(f"{workdir} holds converted weights, and is no run.")
    return from_dict(meta["config"], Config)


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
        config.objective = computed_in(config.objective, dtype)
        objective = config.make_objective()
    abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0)))[player]
    shardings = shardings_of(abstract, mesh)
    with closing(_open(workdir)) as checkpointer:
        network = checkpointer.restore_network(player, abstract, shardings, params)
    return network, config


def load_generator(workdir: str | Path, mesh: Mesh, params: str = "ema", dtype: str = ""):
    """(networks by name, config) of what a run trained to make pictures; see `load_player`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trained nothing of the kind.
    """
    config = load_config(workdir)
    if not isinstance(config.objective, NetworksConfig):
        raise ValueError(
            f"{workdir} is a run of {config.objective.kind}, which trains no transformer."
        )
    return load_player(workdir, config.make_objective().generator, mesh, params, dtype)


def computed_in(objective, dtype: str):
    """The objective's config with all but the autoencoder computed in ``dtype``."""
    networks = {
        name: dataclasses.replace(getattr(objective, name), dtype=dtype)
        for name in ("transformer", "text_encoder", "clip")
    }
    return dataclasses.replace(objective, **networks)


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
    known = _networks_at(path, except_for)
    if only is not None and only not in known:
        raise FileNotFoundError(f"There is no {only} in {place}; there is {', '.join(known)}.")
    wanted = known if only is None else [only]
    return {name: _open_one(path, name, params, except_for) for name in wanted}


def _networks_at(path: Path, except_for: Sequence[str]) -> list[str]:
    """The names of the networks at a place."""
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
        return [kind_of(read_config(path), path).name]
    inside = [
        network.name
        for network in NETWORKS.values()
        if _bfl_file(path, network.name) or (path / network.folder / "config.json").is_file()
    ]
    if not inside:
        raise FileNotFoundError(
            f"There are no weights at {str(path)!r}: it is no run with checkpoints (train one: "
            "python -m kontext_jax.train --workdir=...), no folder of diffusers' layout, and no "
            ".safetensors file."
        )
    return inside


def _open_one(path: Path, name: str, params: str, except_for: Sequence[str]) -> Reader:
    if is_run(path):
        return _open_from_run(path, name, params)
    if (path / "checkpoints").is_dir():  # what `weights.export.write_orbax` wrote
        meta, network = load_meta(path), NETWORKS[name]
        config = config_of(network, meta["networks"][name])
        return OrbaxReader(_item(path, "params"), [name], network, config, meta["records"][name])
    if path.is_file():
        return open_file(path, except_for)
    if (path / "config.json").is_file():
        return open_folder(path, except_for)
    file = _bfl_file(path, name)
    reader = open_file(file, except_for) if file else None
    reader = reader or open_folder(path / NETWORKS[name].folder, except_for)
    if name == "transformer" and "time" not in reader.record and (path / "scheduler").is_dir():
        reader.record["time"] = to_dict(time_of(path))
    return reader


def _bfl_file(folder: Path, name: str) -> Path | None:
    """The network's single file, in a folder of such; pipelines may have one beside their own."""
    file = folder / BFL_FILES.get(name, "-")
    return file if file.is_file() and not (folder / "model_index.json").is_file() else None


def _open_from_run(workdir: Path, name: str, params: str) -> Reader:
    meta, item, network = load_meta(workdir), _item(workdir, params), NETWORKS[name]
    config = from_dict(meta["config"], Config)
    record = record_of(config, int(item.parent.name), params)
    if config.objective.kind == "autoencoder":
        scaled = _scaled(config.objective.autoencoder, meta["metrics"], workdir)
        return OrbaxReader(item, [name], network, scaled, record)
    if name in config.make_objective().frozen():
        reader = open_init(config, name)
        if identity_of_reader(reader) != meta["frozen"][name]:
            raise ValueError(
                f"The {name} that {workdir} was trained with is another now: "
                f"{getattr(config.objective.init_from, network_of(name))} was trained on or "
                "replaced since."
            )
        if name != "transformer":
            return reader
        adapters, _, _ = load_adapters(workdir, params)
        return MergedReader(reader, adapters, record)
    path = [config.make_objective().generator, name]
    return OrbaxReader(item, path, network, getattr(config.objective, name), record)


def open_init(config: Config, name: str) -> Reader:
    """The weights that ``init_from`` names for a network, checked against its config.

    The teacher is what ``init_from.transformer`` names.
    """
    init_from, network = config.objective.init_from, network_of(name)
    place = getattr(init_from, network)
    if not place:
        raise ValueError(
            f"objective.init_from.{network} is empty: this run needs the weights of its {name}."
        )
    try:
        reader = open_network(place, network, except_for=init_from.except_for)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"objective.init_from.{network}: {error}") from error
    if hasattr(config.objective, name):
        # A student of guidance distillation has the input that its teacher lacks.
        teacher = getattr(config.objective, "teacher", None)
        gains = network == "transformer" and teacher != config.objective.transformer
        leaves_out = gains or _leaves_out_guidance(init_from.except_for)
        but = ("guidance_embed",) if leaves_out else ()
        check_same(reader, getattr(config.objective, name), place, but)
    return reader


def network_of(role: str) -> str:
    """Which of `NETWORKS` a player or frozen network is: the teacher is a transformer."""
    return "transformer" if role == "teacher" else role


def _leaves_out_guidance(except_for: Sequence[str]) -> bool:
    """Whether the patterns name all that [dev] has and [schnell] has not, in one layout."""
    rows = [row for row in flux.rows(FluxConfig.dev()) if row.param.startswith("guidance_in")]
    layouts = ([row.bfl for row in rows], [row.diffusers for row in rows])
    return any(all(matches(name, except_for) for name in names) for names in layouts)


def load_adapters(
    workdir: str | Path, params: str = "ema"
) -> tuple[Adapters, FluxConfig, dict[str, Any]]:
    """The adapters that a run trained, the config of their transformer, and the run's record.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the run trained none.
    """
    model, config = load_generator(workdir, make_mesh(MeshConfig()), params)
    if "lora" not in model:
        raise ValueError(f"{workdir} is a run without adapters (objective.lora.rank is 0).")
    step = int(_item(Path(workdir), params).parent.name)
    adapters = jax.device_get(model["lora"])
    return adapters, config.objective.transformer, record_of(config, step, params)


def tokenizers_of(place: Path) -> dict[str, str]:
    """The tokenizers at a place, by their text encoder: a folder, or "byt5"."""
    if is_run(place):
        text = load_config(place).data.text
        known = {"text_encoder": text.tokenizer, "clip": text.clip_tokenizer}
        return {name: source for name, source in known.items() if source}
    folders = {name: place / folder for name, folder in TOKENIZERS.items()}
    return {name: str(folder) for name, folder in folders.items() if folder.is_dir()}


def identity_of_reader(reader: Reader) -> list:
    """What tells a network from others: its values, and an autoencoder's scale of latents."""
    return [fingerprint_of(reader), *_scale_of(reader.config)]


def identity_of(networks: dict[str, Network]) -> dict[str, list]:
    """The same of networks on devices, by name."""
    return {name: [fingerprint(x), *_scale_of(x.config)] for name, x in networks.items()}


def _scale_of(config) -> list[float]:
    is_autoencoder = isinstance(config, AutoencoderConfig)
    return [config.scale_factor, config.shift_factor] if is_autoencoder else []


def usage_of(networks: dict[str, Network], objective) -> dict[str, str]:
    """Settings by which the same networks make other latents, by names such as "teacher.dtype".

    Args:
      networks: frozen ones by name.
      objective: the config that says how a teacher, if there is one, is conditioned.
    """
    usage = {
        f"{name}.{setting}": value
        for name, network in networks.items()
        for setting, value in _dtypes(network.config).items()
    }
    return usage | ({"pooled": objective.pooled} if "teacher" in networks else {})


def record_of(config: Config, step: int, params: str) -> dict[str, Any]:
    """What travels with a run's weights: where they come from, and how they are to be used."""
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


def is_run(place: str | Path) -> bool:
    """Whether training left this, and not ``convert``."""
    return (split_step(place)[0] / "checkpoints").is_dir() and "config" in load_meta(place)


def networks_by_name(player_tree, player: str) -> dict[str, Network]:
    """The networks of a player by name; a player that is one network has the name of the player."""
    return player_tree if isinstance(player_tree, dict) else {player: player_tree}


def _item(folder: Path, name: str) -> Path:
    with closing(_open(folder)) as checkpointer:
        return checkpointer.folder / str(checkpointer.step()) / name


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


def split_step(place: str | Path) -> tuple[Path, int | None]:
    """(folder or file, step) of a place; None where it names no step."""
    path, at, step = str(place).rpartition("@")
    if at and step.isdecimal() and not Path(place).exists():
        return Path(path), int(step)
    return Path(place), None


def steps_at(workdir: str | Path) -> list[int]:
    """The steps whose checkpoints a run has kept.

    Raises:
      FileNotFoundError: there are no checkpoints.
    """
    with closing(_open(workdir)) as checkpointer:
        return checkpointer.steps()


def step_at(place: str | Path) -> int:
    """The step of the checkpoint that a run's place stands for.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    with closing(_open(place)) as checkpointer:
        return checkpointer.step()


def _open(place: str | Path) -> Checkpointer:
    workdir, step = split_step(place)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"There is no run with checkpoints in {str(workdir)!r}; train one with "
            "python -m kontext_jax.train --workdir=..."
        )
    return Checkpointer(workdir, step=step)
