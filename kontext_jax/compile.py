"""Compiles a train step without running it, and says what it needs and how fast it can be.

    python -m kontext_jax.compile --config=configs/X.py[:variant] [--topology=v5p:4x4x4]
        [--num_slices=2] [--json=FILE] [--config.a.b=v ...]

With ``--topology`` it compiles for a slice of TPUs that is elsewhere, or ``--num_slices`` of them,
on any machine with libtpu (``pip install 'kontext-jax[aot]'``); without, for this machine's
devices. Nothing is read or allocated but the settings of weights that are at hand. Rows are as full
as can be of images of the largest size; data of many sizes has more image slots, which the
autoencoder pays for.

The time is that of a roofline, of which no program does better: FLOPs at the chip's peak, memory
traffic at its bandwidth, and what collectives send over all links at once, the three at the same
time ("at best") or one after the other ("without overlap").
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
    """A train step, its text, and its arguments as shapes that know where they live."""

    compiled: jax.stages.Compiled
    text: str
    state: TrainState
    frozen: dict[str, Network]
    batch: Batch
    model_flops: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a train step needs. Bytes, FLOPs and seconds are of one device and step.

    Attributes:
      device_kind, num_devices, mesh: what it was compiled for.
      rows, examples: of a step.
      parameters: of each network.
      memory: bytes of the arguments by name, of temporaries, and of all at the fullest moment.
      capacity: bytes that the device has; None where it is not known.
      cost: see `hlo.Cost`.
      model_flops: see ``flops.py``; 0 where nobody counts them.
      seconds: the roofline's terms, "compute", "memory" and "links"; none where the chip is
        not known.
      mfu: at best, and without overlap.
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
        """Whether the device has the memory, as far as that is known."""
        return self.capacity is None or self.memory["peak"] <= self.capacity


def full_row(data: DataConfig, channels: int = 0) -> Batch:
    """A row that is as full as can be of images of the largest size; its pixels and ids are 0.

    Where all images have that size, `Loader` yields rows of this shape. An example has one context,
    or as many as it takes to fill the row.

    Args:
      data: what is fed, and how; neither the data set nor a store of latents need be there.
      channels: of a token, where latents are fed; 0 where pixels are.

    Raises:
      ValueError: a row cannot hold an image of that size.
    """
    geometry, packing = data.geometry, data.packing
    tokens_of = {size: num_tokens(size, geometry.pixels_per_token) for size in geometry.sizes}
    size = max(tokens_of, key=lambda size: tokens_of[size])
    slots = packing.image_tokens // tokens_of[size]
    if not slots:
        raise ValueError(
            f"An image of {size_key(size)} pixels takes {tokens_of[size]} tokens, a row holds "
            f"{packing.image_tokens}: raise packing.image_tokens or use smaller geometry.sizes."
        )
    count = min(packing.max_examples, max(1, slots // 2))
    image, room = np.zeros((size[1], size[0], 3), np.uint8), {size_key(size): slots}
    if channels:
        image, room = Latents(size, np.zeros((tokens_of[size], channels), DTYPE)), {}
    text_ids = np.zeros(min(data.text.max_tokens, packing.text_tokens // count), np.int32)
    clip_ids = np.zeros(data.text.clip_length, np.int32)
    contexts = (image,) * (slots // count - 1)
    examples = [Example(str(i), image, contexts, text_ids, clip_ids) for i in range(count)]
    row = assemble(examples, range(count), room, data, channels)
    if data.negatives:
        row = row.replace(negative=Prompts(row.text_ids, row.text_segments, row.clip_ids))
    return row


def row_of(config: Config) -> Batch:
    """A full row of what the run reads, pixels or latents; see `full_row`."""
    channels = config.objective.transformer.in_channels if config.data.latents.path else 0
    return full_row(config.data, channels)


def abstract_frozen(config: Config) -> dict[str, Network]:
    """The networks that a run uses and does not train, as shapes in the dtypes they are stored in.

    Of weights that are not at hand it takes bfloat16, as FLUX.1's pipelines have, and for the
    autoencoder the one of ours that fits the transformer.

    Raises:
      ValueError: the weights do not fit the run, or none of our autoencoders does.
    """
    frozen = {}
    for name in config.make_objective().frozen():
        if name == "efficientnet":  # a package brings its weights, in float32
            settings = config.objective.efficientnet
            frozen[name] = nnx.eval_shape(lambda s=settings: EfficientNet(s, rngs=nnx.Rngs(0)))
            continue
        try:
            reader = open_init(config, name)
            dtypes, stored = reader.dtypes, reader.config
        except FileNotFoundError:
            dtypes, stored = {}, None
        network_config = getattr(config.objective, name, stored) or _fitting_autoencoder(config)
        abstract = ALL_NETWORKS[network_of(name)].abstract(network_config)
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, dtypes.get(param, jnp.bfloat16))
            for param, leaf in named_leaves(abstract).items()
        ]
        frozen[name] = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return frozen


def _fitting_autoencoder(config: Config) -> AutoencoderConfig:
    wanted = (config.objective.transformer.in_channels, config.data.geometry.pixels_per_token)
    for known in (AutoencoderConfig.flux(), AutoencoderConfig.tiny()):
        if (known.token_channels, known.pixels_per_token) == wanted:
            return known
    raise ValueError(
        f"There is no autoencoder at {config.objective.init_from.autoencoder!r}, and none is known "
        f"whose tokens have {wanted[0]} channels and are {wanted[1]} pixels wide."
    )


def compile_step(config: Config, mesh: Mesh) -> Step:
    """The train step of a run, compiled for the devices of ``mesh``.

    Raises:
      ValueError: the settings do not fit one another or the mesh.
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
    state, frozen = _placed(state, shardings), _placed(frozen, shardings_of(frozen, mesh))
    train_step = jit_train_step(objective, optimizers, config.optim, config.seed, shardings)
    with jax.set_mesh(mesh):
        stop_requested = jax.ShapeDtypeStruct((mesh.size,), bool, sharding=device_sharding(mesh))
        lowered = train_step.lower(state, frozen, batch, stop_requested)
        try:
            compiled, text = _compile(lowered)
        except jax.errors.JaxRuntimeError as error:
            raise cli.UserError(_reason(error)) from error
    return Step(compiled, text, state, frozen, batch, model_flops)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program and its optimized text, under the mesh in use."""
    if platform() != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # Of large programs `as_text` fails (jaxlib 0.10.2 on what libtpu 0.0.52 makes, "async-update
    # instruction should have 1 operands"), so the TPU compiler is asked to write it itself.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, written.read_text()


def _placed(tree, shardings):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _reason(error: jax.errors.JaxRuntimeError) -> str:
    """One sentence for the two ways in which XLA says that memory is short, or its first line."""
    message = str(error)
    needed = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", message) or re.search(
        r"Used (\S+) of (\S+) hbm", message
    )
    if needed is None:
        return message.splitlines()[0]
    return (
        f"the step does not fit: it needs {needed[1]} of a device's {needed[2]} bytes. Use more "
        "devices, fewer rows (data.batch_size), optim.accumulate_steps, or remat."
    )


def make_report(config: Config, mesh: Mesh, step: Step) -> Report:
    """What the compiled step needs."""
    kind = mesh.devices.flat[0].device_kind
    used = step.compiled.memory_analysis()
    arguments = {name: getattr(step.state, name) for name in ("params", "opt_state", "ema")}
    memory = {
        name: _bytes_on_a_device(tree)
        for name, tree in (arguments | {"frozen": step.frozen, "batch": step.batch}).items()
    }
    memory["temporaries"] = used.temp_size_in_bytes
    memory["peak"] = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
    )
    cost = hlo.analyse(step.text, KERNEL_FLOPS)
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


def _bytes_on_a_device(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def print_report(report: Report) -> None:
    """Prints the table; all numbers but the parameters are of one device and step."""
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
        print(f"  {'the device has':20}{report.capacity / GB:12.3f}")
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
        print(f"seconds      {terms}: {limit} limits")
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
        raise cli.UserError("--num_slices needs --topology: what one of them is.")
    config, devices = validated(options.config), None
    if options.topology:
        jax.config.update("jax_platforms", "cpu")  # the TPUs are elsewhere
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
    config_flags.DEFINE_config_file("config", help_string="a file of configs/, :variant")
    flags.DEFINE_string("topology", "", "TPUs to compile for, such as v5p:4x4x4; else this machine")
    flags.DEFINE_integer("num_slices", 1, "how many slices of --topology", lower_bound=1)
    flags.DEFINE_string("json", "", "file for the same as JSON")
    cli.run("compile", main)
