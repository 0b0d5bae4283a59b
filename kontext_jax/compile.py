"""Compiles a train step without running it, and reports its memory, cost and roofline time.

    python -m kontext_jax.compile --config=configs/X.py[:variant] [--topology=v5p:4x4x4]
        [--num_slices=2] [--json=FILE] [--config.a.b=v ...]

``--topology`` compiles for TPUs that are not attached (``--num_slices`` slices of that topology),
on any machine with libtpu (``pip install 'kontext-jax[aot]'``). Without it, the step is compiled
for this machine's devices. No data is read and no array is allocated; of pretrained weights that
exist, only settings and dtypes are read. Rows are filled with images of the largest size. Data of
many sizes has more image slots per row, which adds autoencoder work.

The time is a lower bound, from a roofline: FLOPs at the chip's peak, memory traffic at its
bandwidth, and collectives over all links at once. The three either overlap fully ("at best") or not
at all ("without overlap").
"""

import dataclasses
import json
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.chips import chip_of
from kontext_jax.compilation import hlo
from kontext_jax.compilation.roofline import roofline
from kontext_jax.compilation.topologies import topology_devices
from kontext_jax.config import Config
from kontext_jax.data.latents import DTYPE
from kontext_jax.data.packing import size_key
from kontext_jax.data.pipeline import DataConfig, assemble
from kontext_jax.geometry import num_tokens
from kontext_jax.loading.locations import network_of, networks_by_name, open_init
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.efficientnet import EfficientNet
from kontext_jax.models.perceptual import abstract_distance
from kontext_jax.models.splash import KERNEL_FLOPS
from kontext_jax.objectives import Network
from kontext_jax.settings import validated
from kontext_jax.sharding import (
    batch_sharding,
    check_batch,
    device_sharding,
    make_mesh,
    platform,
    shardings_of,
)
from kontext_jax.training.train_state import (
    TrainState,
    abstract_state,
    jit_train_step,
    make_optimizers,
)
from kontext_jax.tree_paths import named_leaves
from kontext_jax.types import Batch, Example, Latents, Prompts
from kontext_jax.weights.networks import ALL_NETWORKS

GB = 1e9


class Step(NamedTuple):
    """A compiled train step, its HLO text, and its arguments as shapes with shardings."""

    compiled: jax.stages.Compiled
    hlo_text: str
    state: TrainState
    frozen: dict[str, Network]
    batch: Batch
    model_flops: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a train step needs; bytes, FLOPs and seconds are per device and step.

    Attributes:
      device_kind, num_devices, mesh: the devices that the step is compiled for.
      rows, examples: rows and examples per step.
      parameters: parameter count of each network.
      memory: bytes of each argument by name, of temporaries, and of the peak.
      capacity: memory of a device in bytes; None if not known.
      cost: see `hlo.Cost`.
      model_flops: see ``flops.py``; 0 if not modelled.
      seconds: terms of the roofline, "compute", "memory" and "links"; empty if the chip is not
        known.
      mfu: MFU at best and without overlap; None if the chip is not known.
    """

    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    rows: int
    examples: int
    parameters: dict[str, int]
    memory: dict[str, int]
    capacity: float | None
    cost: hlo.Cost
    model_flops: float
    seconds: dict[str, float]
    mfu: tuple[float, float] | None

    @property
    def fits(self) -> bool:
        """Whether the step fits into the device's memory, if that is known."""
        return self.capacity is None or self.memory["peak"] <= self.capacity


def full_row(data: DataConfig, channels: int = 0) -> Batch:
    """Returns a row filled with images of the largest size; all pixels and ids are 0.

    If all images have that size, `Loader` yields rows of this shape. Each example has one context
    image, or more if that is needed to fill the row.

    Args:
      data: settings of the data; neither the data set nor the latents have to exist.
      channels: channels of a latent token if the run reads latents, 0 if it reads pixels.

    Raises:
      ValueError: an image of that size does not fit into a row.
    """
    geometry, packing = data.geometry, data.packing
    tokens_of = {size: num_tokens(size, geometry.pixels_per_token) for size in geometry.sizes}
    size = max(tokens_of, key=lambda size: tokens_of[size])
    slots = packing.image_tokens // tokens_of[size]
    if not slots:
        raise ValueError(
            f"An image of {size_key(size)} pixels takes {tokens_of[size]} tokens, but a row holds "
            f"{packing.image_tokens}: raise packing.image_tokens or use smaller geometry.sizes."
        )
    count = min(packing.max_examples, max(1, slots // 2))
    image, image_slots = np.zeros((size[1], size[0], 3), np.uint8), {size_key(size): slots}
    if channels:
        image, image_slots = Latents(size, np.zeros((tokens_of[size], channels), DTYPE)), {}
    text_ids = np.zeros(min(data.text.max_tokens, packing.text_tokens // count), np.int32)
    clip_ids = np.zeros(data.text.clip_length, np.int32)
    contexts = (image,) * (slots // count - 1)
    examples = [Example(str(i), image, contexts, text_ids, clip_ids) for i in range(count)]
    row = assemble(examples, range(count), image_slots, data, channels)
    if data.negatives:
        row = row.replace(negative=Prompts(row.text_ids, row.text_segments, row.clip_ids))
    return row


def row_of(config: Config) -> Batch:
    """Returns a full row for a run, of pixels or latents; see `full_row`."""
    channels = config.objective.transformer.in_channels if config.data.latents.path else 0
    return full_row(config.data, channels)


def abstract_frozen(config: Config) -> dict[str, Network]:
    """Returns a run's frozen networks, as shapes with the dtypes in which they are stored.

    Weights that do not exist are assumed to be bfloat16, like FLUX.1's pipelines. A missing
    autoencoder is assumed to be the known one that matches the transformer.

    Raises:
      ValueError: the weights do not match the run, or no known autoencoder does.
    """
    frozen = {}
    for name in config.make_objective().frozen():
        if name == "efficientnet":  # its weights are stored in float32
            settings = config.objective.efficientnet
            frozen[name] = nnx.eval_shape(lambda s=settings: EfficientNet(s, rngs=nnx.Rngs(0)))
            continue
        if name == "perceptual":  # so are LPIPS's
            frozen[name] = abstract_distance(config.objective.perceptual)
            continue
        try:
            reader = open_init(config, name)
            dtypes, stored = reader.dtypes, reader.config
        except FileNotFoundError:
            dtypes, stored = {}, None
        if name == "autoencoder":
            stored = stored or _matching_autoencoder(config)
            network_config = config.objective.frozen_autoencoder(stored)
        else:
            network_config = getattr(config.objective, name)
        abstract = ALL_NETWORKS[network_of(name)].abstract(network_config)
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, dtypes.get(param, jnp.bfloat16))
            for param, leaf in named_leaves(abstract).items()
        ]
        frozen[name] = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return frozen


def _matching_autoencoder(config: Config) -> AutoencoderConfig:
    channels = config.objective.transformer.in_channels
    pixels = config.data.geometry.pixels_per_token
    for known in (AutoencoderConfig.flux(), AutoencoderConfig.tiny()):
        if (known.token_channels, known.pixels_per_token) == (channels, pixels):
            return known
    raise ValueError(
        f"No autoencoder at {config.objective.init_from.autoencoder!r}, and no known autoencoder "
        f"has tokens of {channels} channels that are {pixels} pixels wide."
    )


def compile_step(config: Config, mesh: Mesh) -> Step:
    """Compiles the train step of a run for the devices of ``mesh``.

    Raises:
      ValueError: the settings contradict each other, or do not fit the mesh.
      cli.UserError: the program does not fit into the devices' memory.
    """
    objective = config.make_objective()
    optimizers = make_optimizers(objective, config.optim, config.num_steps)
    state, shardings = abstract_state(objective, optimizers, mesh)
    frozen = abstract_frozen(config)
    row = row_of(config)
    rows = config.data.batch_size
    check_batch(rows, config.optim.accumulate_steps, mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=batch_sharding(mesh)),
        row,
    )
    model_flops = rows * float(jax.jit(objective.flops)(jax.tree.map(lambda x: x[None], row)))
    state = _with_shardings(state, shardings)
    frozen = _with_shardings(frozen, shardings_of(frozen, mesh))
    train_step = jit_train_step(objective, optimizers, config.optim, config.seed, shardings)
    with jax.set_mesh(mesh):
        stop_requested = jax.ShapeDtypeStruct((mesh.size,), bool, sharding=device_sharding(mesh))
        lowered = train_step.lower(state, frozen, batch, stop_requested)
        try:
            compiled, hlo_text = _compile(lowered)
        except jax.errors.JaxRuntimeError as error:
            raise cli.UserError(_error_message(error)) from error
    return Step(compiled, hlo_text, state, frozen, batch, model_flops)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Returns the compiled program and its optimized HLO text."""
    if platform() != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # `as_text` fails for large TPU programs (jaxlib 0.10.2 with libtpu 0.0.52, "async-update
    # instruction should have 1 operands"), so the TPU compiler dumps the text itself.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (dump,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, dump.read_text()


def _with_shardings(tree, shardings):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _error_message(error: jax.errors.JaxRuntimeError) -> str:
    """Returns a sentence for either of XLA's two out-of-memory errors, else the first line."""
    message = str(error)
    needed = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", message) or re.search(
        r"Used (\S+) of (\S+) hbm", message
    )
    if needed is None:
        return message.splitlines()[0]
    return (
        f"the step does not fit: it needs {needed[1]} of a device's {needed[2]} bytes. Use more "
        "devices, fewer rows (data.batch_size), optim.accumulate_steps or remat."
    )


def make_report(config: Config, mesh: Mesh, step: Step) -> Report:
    """Returns the report of a compiled step."""
    kind = mesh.devices.flat[0].device_kind
    usage = step.compiled.memory_analysis()
    arguments = {name: getattr(step.state, name) for name in ("params", "opt_state", "ema")}
    memory = {
        name: _bytes_per_device(tree)
        for name, tree in (arguments | {"frozen": step.frozen, "batch": step.batch}).items()
    }
    memory["temporaries"] = usage.temp_size_in_bytes
    memory["peak"] = (
        usage.argument_size_in_bytes
        + usage.output_size_in_bytes
        - usage.alias_size_in_bytes
        + usage.temp_size_in_bytes
    )
    cost = hlo.analyse(step.hlo_text, KERNEL_FLOPS)
    model_flops = step.model_flops / mesh.size
    chip = chip_of(kind)
    seconds, mfu = roofline(cost, model_flops, chip)
    trained = {
        name: network
        for player, tree in step.state.params.items()
        for name, network in networks_by_name(tree, player).items()
    }
    return Report(
        device_kind=kind,
        num_devices=mesh.size,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        rows=config.data.batch_size,
        examples=config.data.batch_size * int(np.sum(row_of(config).example_ids >= 0)),
        parameters={
            name: sum(leaf.size for leaf in jax.tree.leaves(network))
            for name, network in (trained | step.frozen).items()
        },
        memory=memory,
        capacity=chip.memory / chip.devices if chip.memory else None,
        cost=cost,
        model_flops=model_flops,
        seconds=seconds,
        mfu=mfu,
    )


def _bytes_per_device(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def print_report(report: Report) -> None:
    """Prints the report; all numbers except parameter counts are per device and step."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items()) or "1"
    print(
        f"{report.num_devices} x {report.device_kind}, mesh {mesh}, {report.rows} rows with "
        f"{report.examples} examples a step"
    )
    print("parameters   " + ", ".join(f"{n} {size:,}" for n, size in report.parameters.items()))
    print("memory, GB")
    for name, size in report.memory.items():
        print(f"  {name:20}{size / GB:12.3f}")
    if report.capacity:
        print(f"  {'device capacity':20}{report.capacity / GB:12.3f}")
    print(f"{'collectives':22}{'count':>12}{'GB sent':>12}")
    for kind, sent in report.cost.collectives.items():
        print(f"  {kind:20}{sent.count:12,.0f}{sent.bytes / GB:12.3f}")
    print(f"{'executed TFLOP':22}{report.cost.flops / 1e12:12.3f}")
    if report.model_flops:
        ratio = report.cost.flops / report.model_flops
        print(f"{'model TFLOP':22}{report.model_flops / 1e12:12.3f}   executed / model {ratio:.3f}")
    print(f"{'memory traffic, GB':22}{report.cost.bytes / GB:12.3f}")
    if report.cost.opaque:
        calls = ", ".join(f"{count:.0f} x {name}" for name, count in report.cost.opaque.items())
        print(f"not counted in FLOPs: {calls}")
    if report.cost.unknown_loops:
        print(f"counted once: {report.cost.unknown_loops} loops of unknown length")
    if report.seconds:
        terms = ", ".join(f"{name} {value:.4f}" for name, value in report.seconds.items())
        limit = max(report.seconds, key=report.seconds.__getitem__)
        print(f"seconds      {terms}: limited by {limit}")
    if report.seconds and report.model_flops:
        best, worst = report.mfu
        print(
            f"step         {max(report.seconds.values()):.4f} s at best, MFU {best:.1%}; "
            f"{sum(report.seconds.values()):.4f} s without overlap, MFU {worst:.1%}"
        )


def main() -> None:
    options = flags.FLAGS
    if options.config is None:
        raise cli.UserError("give --config=configs/X.py[:variant].")
    cli.check_config(options.config, Config)
    if options.num_slices > 1 and not options.topology:
        raise cli.UserError("--num_slices needs --topology, the topology of one slice.")
    config, devices = validated(options.config), None
    if options.topology:
        jax.config.update("jax_platforms", "cpu")  # no TPU is attached
        devices = topology_devices(options.topology, options.num_slices)
    mesh = make_mesh(config.mesh, devices)
    began = time.monotonic()
    report = make_report(config, mesh, compile_step(config, mesh))
    print_report(report)
    print(f"compiled in {time.monotonic() - began:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    if not report.fits:
        raise cli.UserError(
            f"the step does not fit: it needs {report.memory['peak'] / GB:.1f} of "
            f"{report.capacity / GB:.1f} GB."
        )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="configs/FILE.py[:variant]")
    flags.DEFINE_string(
        "topology", "", "TPUs to compile for, like v5p:4x4x4 (default: this machine's devices)"
    )
    flags.DEFINE_integer("num_slices", 1, "number of slices of --topology", lower_bound=1)
    flags.DEFINE_string("json", "", "file to which the report is written as JSON")
    cli.run("compile", main)
