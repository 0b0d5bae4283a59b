"""Compares written networks with PyTorch's on the same inputs; needs the extra ``convert``.

A file can hold every bit under a wrong name. So diffusers or transformers builds each network
again, and both networks get the same random inputs.
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
"""Largest difference, relative to the largest output.

In networks of FLUX's depth or width, float32 alone differs by up to 1e-5. Two tensors with swapped
names differ by about 1, and settings that are read differently mostly by 0.01 or more.
"""

Arrays = dict[str, np.ndarray]


def verify(output: Path, readers: Mapping[str, Reader]) -> Iterator[str]:
    """Compares the networks one by one, and yields a line on the agreement of each.

    PyTorch reads diffusers' folders itself; for other layouts it gets our parameters under
    diffusers' names. Everything is computed in float32 on the CPU, whatever the stored dtype.
    PyTorch's network is freed before ours is loaded, so memory has to hold four bytes per
    parameter: 48 GB for FLUX's transformer.

    Args:
      output: location of the networks.
      readers: their readers, see `locations.open_networks`.

    Raises:
      ValueError: diffusers does not support a network's settings.
      WeightsError: PyTorch cannot build a network from the weights, or its outputs differ.
    """
    for name, reader in readers.items():
        probe = PROBES[name]
        inputs = probe.inputs(reader.config, np.random.default_rng(0))
        expected = _run_pytorch(probe, reader, _folder(output, reader.network), inputs)
        yield f"{name}: {_compare(name, _run_jax(probe, reader, inputs), expected)}"


def _compare(name: str, outputs: Arrays, expected: Arrays) -> str:
    errors = []
    for output, values in expected.items():
        largest, difference = np.abs(values).max(), np.abs(outputs[output] - values).max()
        if not difference <= TOLERANCE * largest:  # also true of NaN
            raise WeightsError(
                f"The {name} differs in PyTorch: {output} is off by {difference:.1e} where the "
                f"largest value is {largest:.2g}. Do not use the output."
            )
        errors.append((difference / max(largest, np.finfo(np.float32).tiny), difference, largest))
    _, difference, largest = max(errors)
    return f"PyTorch and JAX agree to {difference:.1e} of outputs up to {largest:.2g}"


class Probe(NamedTuple):
    """Inputs and calls that compare one kind of network.

    Attributes:
      inputs: function from its config and a generator to random inputs without a batch axis.
      pytorch, jax: functions from a network and batched inputs to its outputs.
    """

    inputs: Callable[[Any, np.random.Generator], Arrays]
    pytorch: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    jax: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


def _run_jax(probe: Probe, reader: Reader, inputs: Arrays) -> Arrays:
    config = dataclasses.replace(reader.config, dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    network = load(reader, config, mesh, dtype=None)
    batch = {name: x[None] for name, x in inputs.items()}
    # Parameters in half precision are promoted to float32.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return {name: np.asarray(x) for name, x in jax.jit(probe.jax)(network, batch).items()}


def _run_pytorch(probe: Probe, reader: Reader, folder: Path | None, inputs: Arrays) -> Arrays:
    network = _from_tensors(reader) if folder is None else _from_folder(reader, folder)
    batch = {name: torch.from_numpy(x[None]) for name, x in inputs.items()}
    with torch.inference_mode():
        return {name: x.numpy() for name, x in probe.pytorch(network.eval(), batch).items()}


def _folder(output: Path, network: Network) -> Path | None:
    """Returns the network's folder if it is in diffusers' layout, else None."""
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
        raise WeightsError(f"PyTorch cannot load {folder}: {'; '.join(wrong)}.")
    return network


def _from_tensors(reader: Reader) -> torch.nn.Module:
    kind = reader.network
    values, cls = kind.format.to_json(reader.config), _class(kind)
    if kind.library == "diffusers":
        network = cls.from_config(values)
    else:
        network = cls(cls.config_class(**values))
    table = kind.table(reader.config, "diffusers")
    params = {kind.format.canonical_name(name): param for name, param in network.named_parameters()}
    if params.keys() != table.tensors().keys():
        wrong = sorted(map(str, params.keys() ^ table.tensors().keys()))
        raise WeightsError(f"PyTorch's {kind.name} has other tensors: {', '.join(wrong)}.")
    with torch.no_grad():
        for key, pieces in table.pieces.items():
            values = reader.read(key)
            for piece in pieces:
                tensor = piece.to_tensor(values).astype(np.float32)
                params[piece.name].copy_(torch.from_numpy(tensor))
    return network


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _transformer_inputs(config: FluxConfig, rng: np.random.Generator) -> Arrays:
    """Returns a target, a context and a prompt; tokens are as far apart as in large images."""
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
    """Returns ids with an end (1) and pads (0), longer than the largest distance that T5 tells."""
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
    """Returns ids padded with the end id."""
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
