"""Whether written networks compute in PyTorch what they compute here; needs the extra ``convert``.

A file can hold every bit under a wrong name. So each network is built a second time by diffusers or
transformers, and both are given the same random inputs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kontext_jax.geometry import GeometryConfig, position_ids
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.clip import ClipConfig, ClipText
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import load
from kontext_jax.weights.networks import Network
from kontext_jax.weights.reading import Reader

try:
    import diffusers
    import torch
    import transformers
except ImportError as error:
    raise ImportError(
        f"Comparing with PyTorch needs torch and diffusers ({error}): pip install -e '.[convert]'"
    ) from error

TOLERANCE = 1e-3
"""Largest difference, as a share of the largest output.

float32 alone makes one of up to 1e-5 in networks of FLUX's depth or width. Tensors with one
another's names make one of about 1, settings that are read otherwise mostly of 0.01 or more.
"""

Arrays = dict[str, np.ndarray]


def verify(output: Path, readers: Mapping[str, Reader]) -> Iterator[str]:
    """Compares one network after the other, and says of each how well it agrees.

    PyTorch reads diffusers' folders by itself; otherwise it gets our parameters under diffusers'
    names. All is computed in float32 on the CPU, whatever the weights are stored in. PyTorch's
    network is gone before ours is loaded, so that four bytes a parameter must fit into memory:
    48 GB for FLUX's transformer.

    Args:
      output: where the networks are.
      readers: all of them, see ``places.open_networks``.

    Raises:
      ValueError: diffusers has no such network.
      WeightsError: PyTorch cannot make a network of what is there, or it computes something else.
    """
    for name, reader in readers.items():
        probe = PROBES[name]
        inputs = probe.inputs(reader.config, np.random.default_rng(0))
        wanted = _run_pytorch(probe, reader, _folder(output, reader.network), inputs)
        yield f"{name}: {_compare(name, _run_jax(probe, reader, inputs), wanted)}"


def _compare(name: str, outputs: Arrays, wanted: Arrays) -> str:
    found = []
    for output, values in wanted.items():
        largest, difference = np.abs(values).max(), np.abs(outputs[output] - values).max()
        if not difference <= TOLERANCE * largest:  # nor if one of them is no number
            raise WeightsError(
                f"The {name} is not the same network in PyTorch: {output} differs by "
                f"{difference:.1e} where the largest is {largest:.2g}. Do not use what was written."
            )
        found.append((difference / max(largest, np.finfo(np.float32).tiny), difference, largest))
    _, difference, largest = max(found)
    return f"PyTorch and JAX agree to {difference:.1e} of outputs up to {largest:.2g}"


class Probe(NamedTuple):
    """How a kind of network is tried.

    Attributes:
      inputs: random ones of its config, without an axis for the batch.
      pytorch, jax: a network's outputs for them.
    """

    inputs: Callable[[Any, np.random.Generator], Arrays]
    pytorch: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    jax: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


def _run_jax(probe: Probe, reader: Reader, inputs: Arrays) -> Arrays:
    config = dataclasses.replace(reader.config, dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    network = load(reader, config, mesh, dtype=None)
    rows = {name: x[None] for name, x in inputs.items()}
    # Parameters in half precision meet float32.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return {name: np.asarray(x) for name, x in jax.jit(probe.jax)(network, rows).items()}


def _run_pytorch(probe: Probe, reader: Reader, folder: Path | None, inputs: Arrays) -> Arrays:
    network = _from_tensors(reader) if folder is None else _from_folder(reader, folder)
    rows = {name: torch.from_numpy(x[None]) for name, x in inputs.items()}
    with torch.inference_mode():
        return {name: x.numpy() for name, x in probe.pytorch(network.eval(), rows).items()}


def _folder(output: Path, network: Network) -> Path | None:
    """The folder of diffusers' layout with this network, if it is in one."""
    folders = (output / network.folder, output)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _class(network: Network):
    library = diffusers if network.library == "diffusers" else transformers
    return getattr(library, network.class_name)


def _from_folder(reader: Reader, folder: Path) -> torch.nn.Module:
    dtype = "torch_dtype" if reader.network.library == "diffusers" else "dtype"
    network, report = _class(reader.network).from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **{dtype: torch.float32}
    )
    wrong = [f"{what} {sorted(map(str, names))}" for what, names in report.items() if names]
    if wrong:
        raise WeightsError(f"PyTorch does not find itself in {folder}: {'; '.join(wrong)}.")
    return network


def _from_tensors(reader: Reader) -> torch.nn.Module:
    kind = reader.network
    values, cls = kind.format.to_json(reader.config), _class(kind)
    if kind.library == "diffusers":
        network = cls.from_config(values)
    else:
        network = cls(cls.config_class(**values))
    table = kind.table(reader.config, "diffusers")
    params = {kind.format.known_as(name): param for name, param in network.named_parameters()}
    if params.keys() != table.tensors().keys():
        wrong = sorted(map(str, params.keys() ^ table.tensors().keys()))
        raise WeightsError(f"PyTorch's {kind.name} has other tensors: {', '.join(wrong)}.")
    with torch.no_grad():
        for place, pieces in table.pieces.items():
            values = reader.read(place)
            for piece in pieces:
                tensor = piece.to_tensor(values).astype(np.float32)
                params[piece.name].copy_(torch.from_numpy(tensor))
    return network


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _transformer_inputs(config: FluxConfig, rng: np.random.Generator) -> Arrays:
    """A target, a context, and a prompt; tokens lie as far apart as in large images."""
    target, context = (6, 4), (5, 3)
    geometry = GeometryConfig(sizes=(target, context), pixels_per_token=1)
    positions = position_ids(target, [context], geometry) * np.array([1, 10, 10], np.int32)
    return {
        "latents": _normal(rng, len(positions), config.in_channels),
        "positions": positions,
        "text": _normal(rng, 7, config.context_in_dim),
        "pooled": _normal(rng, config.vec_in_dim),
        "t": np.array(0.7, np.float32),
        "guidance": np.array(2.5, np.float32),
    }


def _transformer_pytorch(
    network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    out = network(
        hidden_states=inputs["latents"],
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["t"],
        guidance=inputs["guidance"] if network.config.guidance_embeds else None,
        img_ids=inputs["positions"][0].float(),
        txt_ids=torch.zeros(inputs["text"].shape[1], 3),
    )
    return {"the velocity": out.sample}


def _transformer_jax(network: Flux, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    latents, text = inputs["latents"], inputs["text"]
    velocity = network(
        latents,
        text,
        inputs["pooled"][:, None],
        inputs["t"][:, None],
        positions=inputs["positions"],
        segments=_one_example(latents),
        text_segments=_one_example(text),
        guidance=inputs["guidance"][:, None] if network.config.guidance_embed else None,
    )
    return {"the velocity": velocity}


def _one_example(tokens: jax.Array) -> jax.Array:
    return jax.numpy.ones(tokens.shape[:2], np.int32)


def _autoencoder_inputs(config: AutoencoderConfig, rng: np.random.Generator) -> Arrays:
    cells = (6, 4)
    height, width = (config.downsample * number for number in cells)
    return {
        "pixels": rng.uniform(-1, 1, (height, width, 3)).astype(np.float32),
        "latents": _normal(rng, *cells, config.latent_channels),
    }


def _autoencoder_pytorch(
    network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    pixels, latents = (inputs[name].movedim(-1, 1) for name in ("pixels", "latents"))
    scale, shift = network.config.scaling_factor, network.config.shift_factor
    posterior = network.encode(pixels).latent_dist
    outputs = {
        "the latents": scale * (posterior.mean - shift),
        "their log-variance": posterior.logvar,
        "the image": network.decode(latents / scale + shift).sample,
    }
    return {name: x.movedim(1, -1) for name, x in outputs.items()}


def _autoencoder_jax(network: Autoencoder, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        "the latents": network.encode(inputs["pixels"]),
        "their log-variance": network.moments(inputs["pixels"])[1],
        "the image": network.decode(inputs["latents"]),
    }


def _text_encoder_inputs(config: T5Config, rng: np.random.Generator) -> Arrays:
    """A prompt with an end (1) and pads (0), longer than the farthest distance that T5 tells."""
    length = config.relative_attention_max_distance + 32
    ids = rng.integers(2, config.vocab_size, length, np.int32)
    ids[-8:] = 1, 0, 0, 0, 0, 0, 0, 0
    return {"ids": ids}


def _text_encoder_pytorch(
    network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {"the text": network(inputs["ids"].long()).last_hidden_state}


def _text_encoder_jax(network: T5Encoder, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"the text": network(inputs["ids"], _one_example(inputs["ids"]))}


def _clip_inputs(config: ClipConfig, rng: np.random.Generator) -> Arrays:
    """A prompt with an end, which also pads."""
    ids = rng.integers(0, config.vocab_size - 1, config.max_positions, np.int32)
    ids += ids >= config.eos_id
    ids[2 * len(ids) // 3 :] = config.eos_id
    return {"ids": ids}


def _clip_pytorch(
    network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {"the prompt's vector": network(inputs["ids"].long()).pooler_output}


def _clip_jax(network: ClipText, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"the prompt's vector": network(inputs["ids"])}


PROBES = {
    "transformer": Probe(_transformer_inputs, _transformer_pytorch, _transformer_jax),
    "autoencoder": Probe(_autoencoder_inputs, _autoencoder_pytorch, _autoencoder_jax),
    "text_encoder": Probe(_text_encoder_inputs, _text_encoder_pytorch, _text_encoder_jax),
    "clip": Probe(_clip_inputs, _clip_pytorch, _clip_jax),
}
