"""Times FLUX's transformer and autoencoder: ours against diffusers' in PyTorch.

    python launch/benchmark.py                     # a small model on the CPU
    python launch/benchmark.py --preset=gpu_8704   # six layers of FLUX.1 [dev] on a GPU: a target
                                                   # and a context of 1024 x 1024 pixels, and text
    python launch/benchmark.py --preset=gpu_4608   # the same without the context
    python launch/benchmark.py --preset=gpu_4608 --device=cpu --width=128 --heads=4 --tokens=64,0,32
    python launch/benchmark.py --preset=autoencoder                 # a train step at 256 pixels
    python launch/benchmark.py --preset=autoencoder --task=decode --size=512

Requires PyTorch: ``pip install -e '.[convert]'``.

A step is the forward pass, the mean squared error of the target's velocity, the backward pass,
gradient clipping and an AdamW update, on one batch that stays on the device. Parameters, gradients
and moments are float32; a bfloat16 preset computes in bfloat16 (autocast in PyTorch). "eager" is
diffusers' ``FluxTransformer2DModel``, "compiled" the same with ``torch.compile``; both use fused
AdamW. All sides start from the same weights, exported in diffusers' layout. The losses of the first
steps have to agree before any step is timed, which also compares the AdamW updates.

A step of the autoencoder is a train step on the mean absolute plus the mean squared error of a
reconstruction, without clipping, or only encodes images, or only decodes latents; the "loss" is
then the mean square of the result. diffusers' class is ``AutoencoderKL``.

Each side runs in its own process, with one thread per core. The sides take turns of a few steps, so
that other load on the machine affects all of them. A time is the duration of a turn divided by its
steps; the median, the minimum and the interquartile range relative to the median are printed. The
ratio is theirs to ours: above 1, ours is faster. FLOP/s are model FLOPs (``kontext_jax/flops.py``),
three times those of the forward pass regardless of recomputation; MFU is relative to a GPU's peak
in bfloat16. ``--profile`` adds the costs of one traced step of ours, by source line. A fusion is
attributed to the line of its last operation. On a CPU the costs are thread seconds, and a matrix
product counts only the thread that waits for it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from kontext_jax import cli, flow
from kontext_jax.chips import chip_of
from kontext_jax.flops import traced_flops, training_flops
from kontext_jax.geometry import GeometryConfig, position_ids
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.optim import OptimConfig, make_optimizer
from kontext_jax.weights.export import write_diffusers
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader

SIDES = ("ours", "eager", "compiled")
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
WARM_UP = 3
TASKS = ("train", "encode", "decode")
PROFILE, NUM_COSTS = -1, 25
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative tolerance of the losses of the warm-up steps."""

OPTIM = OptimConfig(warmup_steps=0)


def check_common(case: "Case | AutoencoderCase") -> None:
    """Checks the fields that all cases have."""
    if case.device not in PLATFORMS:
        raise ValueError(f"device {case.device!r} is not one of {', '.join(PLATFORMS)}.")
    if case.sides[:1] != SIDES[:1] or not set(case.sides) <= set(SIDES):
        raise ValueError(f"sides must be some of {', '.join(SIDES)}, starting with ours.")
    if case.remat not in ("none", "full"):
        raise ValueError(
            f"remat {case.remat!r} is not one of none, full, the modes that PyTorch has too."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The setting of a benchmark of the transformer; every field is a flag.

    Attributes:
      device: "cpu" or "gpu".
      depth: number of double-stream and of single-stream blocks.
      tokens: number of target, context and text tokens; images are square.
      remat: "none", or "full" to recompute every block in the backward pass.
      sides: some of `SIDES`, in the order of their turns.
      steps: steps per turn; the host waits for the last one only.
    """

    device: str = "cpu"
    depth: tuple[int, int] = (2, 4)
    width: int = 128
    heads: int = 4
    tokens: tuple[int, int, int] = (256, 256, 32)
    text_width: int = 64
    pooled_width: int = 64
    batch: int = 2
    dtype: str = "float32"
    remat: str = "none"
    sides: tuple[str, ...] = SIDES
    steps: int = 1

    def __post_init__(self):
        check_common(self)
        if any(math.isqrt(num) ** 2 != num for num in self.tokens[:2]):
            raise ValueError(
                f"tokens {self.tokens}: images are square, so their tokens must be square numbers."
            )

    def flux(self) -> FluxConfig:
        head_dim = self.width // self.heads
        axes_dim = (head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16)
        return FluxConfig(
            hidden_size=self.width,
            num_heads=self.heads,
            depth=self.depth[0],
            depth_single=self.depth[1],
            vec_in_dim=self.pooled_width,
            context_in_dim=self.text_width,
            axes_dim=axes_dim,
            guidance_embed=False,
            dtype=self.dtype,
            remat=self.remat,
        )

    def flops(self) -> float:
        target, contexts, text = self.tokens
        example = training_flops(self.flux(), target=target, contexts=contexts, text=text)
        return self.batch * example

    def __str__(self) -> str:
        target, contexts, text = self.tokens
        return (
            f"{self.depth[0]} double + {self.depth[1]} single blocks, width {self.width}, "
            f"{self.heads} heads, {target} target + {contexts} context + {text} text tokens"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderCase:
    """The setting of a benchmark of the autoencoder; other fields as in `Case`.

    Attributes:
      task: one of `TASKS`.
      size: sides of the images, in pixels.
      channels, groups: width of the finest level, and groups of every GroupNorm.
    """

    device: str = "cpu"
    task: str = "train"
    size: int = 256
    channels: int = 32
    groups: int = 8
    batch: int = 1
    dtype: str = "float32"
    remat: str = "none"
    sides: tuple[str, ...] = SIDES
    steps: int = 1

    def __post_init__(self):
        check_common(self)
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}.")

    def config(self) -> AutoencoderConfig:
        return AutoencoderConfig.flux(
            channels=self.channels, num_groups=self.groups, dtype=self.dtype, remat=self.remat
        )

    def flops(self) -> float:
        model = jax.eval_shape(lambda: Autoencoder(self.config(), rngs=nnx.Rngs(0)))
        once = traced_flops(functools.partial(run_task, self.task), model, self.inputs())
        return once * (3 if self.task == "train" else 1)

    def inputs(self) -> np.ndarray:
        """Random images or, to decode, latents."""
        shape = (self.size, self.size, 3)
        if self.task == "decode":
            config = self.config()
            shape = (*[self.size // config.downsample] * 2, config.latent_channels)
        return np.random.default_rng(0).uniform(-1, 1, (self.batch, *shape)).astype(np.float32)

    def __str__(self) -> str:
        return f"autoencoder, {self.channels} channels: {self.task} at {self.size} pixels"


GPU = Case(
    device="gpu",
    width=3072,
    heads=24,
    tokens=(4096, 4096, 512),
    text_width=4096,
    pooled_width=768,
    batch=1,
    dtype="bfloat16",
    sides=("ours", "compiled"),
    steps=5,
)
PRESETS = {
    "cpu": Case(),
    "gpu_8704": GPU,
    "gpu_4608": dataclasses.replace(GPU, tokens=(4096, 0, 512)),
    "autoencoder": AutoencoderCase(),
}

flags.DEFINE_enum("preset", "cpu", list(PRESETS), "the case; the other flags override its fields")
flags.DEFINE_integer("rounds", 15, "number of turns of each side", lower_bound=1)
flags.DEFINE_bool("profile", False, "whether to also print the costs of our step")
FIELDS = {f.name: f.type for cls in (Case, AutoencoderCase) for f in dataclasses.fields(cls)}
for name, kind in FIELDS.items():
    by_type = {int: flags.DEFINE_integer, str: flags.DEFINE_string}
    by_type.get(kind, flags.DEFINE_list)(name, None, f"{name} of the case")


def case_of_flags() -> Case | AutoencoderCase:
    """Returns the preset, with the fields that other flags override."""
    case = PRESETS[flags.FLAGS.preset]
    changes, olds = {}, dataclasses.asdict(case)
    for name in FIELDS:
        new = flags.FLAGS[name].value
        if new is not None and name not in olds:
            raise cli.UserError(f"--{name} is not a setting of --preset={flags.FLAGS.preset}.")
        if isinstance(new, list):
            new = tuple(type(olds[name][0])(item) for item in new)
        changes |= {} if new is None else {name: new}
    return dataclasses.replace(case, **changes)


def make_batch(case: Case) -> dict[str, np.ndarray]:
    """Returns random inputs: noisy targets, followed by contexts, and the velocity to predict."""
    rng, config = np.random.default_rng(0), case.flux()
    target, contexts, text = case.tokens

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((case.batch, *shape), np.float32)

    sizes = [(math.isqrt(num), math.isqrt(num)) for num in (target, contexts) if num]
    geometry = GeometryConfig(sizes=tuple(sizes), pixels_per_token=1)
    t = rng.uniform(0.2, 0.8, case.batch).astype(np.float32)
    latents, noise = (normal(target, config.in_channels) for _ in range(2))
    noisy = flow.interpolate(latents, noise, t[:, None, None])
    positions = position_ids(sizes[0], sizes[1:], geometry)
    return {
        "latents": np.concatenate([noisy, normal(contexts, config.in_channels)], axis=1),
        "text": normal(text, config.context_in_dim),
        "pooled": normal(config.vec_in_dim),
        "t": t,
        "positions": np.tile(positions, (case.batch, 1, 1)),
        "velocity": flow.velocity(latents, noise),
    }


def make_ours(case: Case, folder: Path):
    """Returns our step and its HLO text; writes the initial weights of all sides to ``folder``."""

    @jax.jit
    def init(key) -> Flux:
        # New blocks are the identity; with noise, every parameter affects the loss.
        model = Flux(case.flux(), rngs=nnx.Rngs(key))
        leaves, treedef = jax.tree.flatten(model)
        keys = jax.random.split(key, len(leaves))
        noisy = [
            x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy)

    optimizer = make_optimizer(OPTIM, num_steps=1)
    model = init(jax.random.key(0))
    write_diffusers(ArrayReader(NETWORKS["transformer"], model), folder, record={})
    opt_state = jax.jit(optimizer.init)(model)
    batch = jax.device_put(make_batch(case))

    def train_step(model, opt_state, batch):
        def loss_fn(model):
            target = batch["velocity"].shape[1]
            out = model(
                batch["latents"],
                batch["text"],
                batch["pooled"][:, None],
                batch["t"][:, None],
                positions=batch["positions"],
                segments=jnp.ones(batch["latents"].shape[:2], jnp.int32),
                text_segments=jnp.ones(batch["text"].shape[:2], jnp.int32),
            )
            return jnp.mean(jnp.square(out[:, :target] - batch["velocity"]))

        loss, grads = jax.value_and_grad(loss_fn)(model)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, loss

    return compiled_step(train_step, model, opt_state, batch)


def compiled_step(step_fn: Callable, model, opt_state, inputs):
    """Returns a function without arguments that takes a step and returns its loss; its HLO text."""
    compiled = jax.jit(step_fn, donate_argnums=(0, 1)).lower(model, opt_state, inputs).compile()

    def step() -> jax.Array:
        nonlocal model, opt_state
        model, opt_state, loss = compiled(model, opt_state, inputs)
        return loss

    return step, compiled.as_text()


def their_network(network_class, case: Case | AutoencoderCase, folder: Path):
    """Loads a network of diffusers' to train it on the case's device; PyTorch uses all cores."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = network_class.from_pretrained(folder, torch_dtype=torch.float32)
    network = network.to(PLATFORMS[case.device])
    network.train()
    if case.remat == "full":
        network.enable_gradient_checkpointing()
    return network


def make_theirs(case: Case, folder: Path, use_compile: bool):
    """Returns diffusers' step, without an HLO text."""
    import torch
    from diffusers import FluxTransformer2DModel

    device, dtype = PLATFORMS[case.device], getattr(torch, case.dtype)
    network = their_network(FluxTransformer2DModel, case, folder)
    params = list(network.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps, fused=True
    )
    forward = torch.compile(network) if use_compile else network
    batch = {name: torch.from_numpy(x).to(device) for name, x in make_batch(case).items()}
    text_positions = torch.zeros(case.tokens[2], 3, device=device)
    flash = [torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    flash += [torch.nn.attention.SDPBackend.CUDNN_ATTENTION] if device == "cuda" else []

    def step() -> torch.Tensor:
        adamw.zero_grad()
        with (
            torch.autocast(device, dtype, enabled=case.dtype != "float32"),
            torch.nn.attention.sdpa_kernel(flash),
        ):
            out = forward(
                hidden_states=batch["latents"],
                encoder_hidden_states=batch["text"],
                pooled_projections=batch["pooled"],
                timestep=batch["t"],
                img_ids=batch["positions"][0].float(),
                txt_ids=text_positions,
                return_dict=False,
            )[0]
        velocity = batch["velocity"]
        loss = (out[:, : velocity.shape[1]].float() - velocity).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, OPTIM.clip_norm)
        adamw.step()
        return loss.detach()

    return step, ""


def run_task(task: str, model: Autoencoder, inputs: jax.Array) -> jax.Array:
    """Returns reconstructions, latents or images."""
    if task == "train":
        return model.decode(model.encode(inputs))
    return getattr(model, task)(inputs)


def make_our_autoencoder(case: AutoencoderCase, folder: Path):
    """As `make_ours`."""
    optimizer = optax.adamw(
        OPTIM.learning_rate, OPTIM.b1, OPTIM.b2, OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    model = jax.jit(lambda: Autoencoder(case.config(), rngs=nnx.Rngs(0)))()
    write_diffusers(ArrayReader(NETWORKS["autoencoder"], model), folder, record={})
    opt_state, inputs = jax.jit(optimizer.init)(model), jnp.asarray(case.inputs())

    def step_fn(model, opt_state, inputs):
        def loss_fn(model):
            out = run_task(case.task, model, inputs)
            if case.task != "train":
                return jnp.mean(jnp.square(out))
            return jnp.mean(jnp.abs(out - inputs)) + jnp.mean(jnp.square(out - inputs))

        if case.task != "train":
            return model, opt_state, loss_fn(model)
        loss, grads = jax.value_and_grad(loss_fn)(model)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, loss

    return compiled_step(step_fn, model, opt_state, inputs)


def make_their_autoencoder(case: AutoencoderCase, folder: Path, use_compile: bool):
    """As `make_theirs`."""
    import torch
    from diffusers import AutoencoderKL

    device, config = PLATFORMS[case.device], case.config()
    network = their_network(AutoencoderKL, case, folder)
    adamw = torch.optim.AdamW(
        network.parameters(),
        lr=OPTIM.learning_rate,
        betas=(OPTIM.b1, OPTIM.b2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )
    inputs = torch.from_numpy(case.inputs()).to(device).permute(0, 3, 1, 2).contiguous()

    def run(inputs: torch.Tensor) -> torch.Tensor:
        if case.task == "train":
            return network.decode(network.encode(inputs).latent_dist.mean).sample
        if case.task == "encode":
            mean = network.encode(inputs).latent_dist.mean
            return config.scale_factor * (mean - config.shift_factor)
        return network.decode(inputs / config.scale_factor + config.shift_factor).sample

    forward = torch.compile(run) if use_compile else run
    mixed = torch.autocast(device, getattr(torch, case.dtype), enabled=case.dtype != "float32")

    def step() -> torch.Tensor:
        with mixed, torch.set_grad_enabled(case.task == "train"):
            out = forward(inputs).float()
        if case.task != "train":
            return out.square().mean()
        adamw.zero_grad()
        loss = (out - inputs).abs().mean() + (out - inputs).square().mean()
        loss.backward()
        adamw.step()
        return loss.detach()

    return step, ""


MAKERS = {
    Case: (make_ours, make_theirs),
    AutoencoderCase: (make_our_autoencoder, make_their_autoencoder),
}
"""Of each kind of case: the functions that make our step, and diffusers'."""


def serve(connection: Connection, make: Callable, *args) -> None:
    """The main loop of a side's process: runs requested numbers of steps until 0 are requested.

    Args:
      connection: connection to the main process.
      make: returns the step and its HLO text.
      args: arguments of ``make``.
    """
    step, hlo = make(*args)
    while num := connection.recv():
        if num == PROFILE:
            connection.send(costs(step, hlo))
            continue
        start = time.perf_counter()
        for _ in range(num):
            loss = step()
        connection.send((float(loss), (time.perf_counter() - start) / num))


class Side:
    """The process of one side, as seen from the main process."""

    def __init__(self, make: Callable, *args):
        spawn = multiprocessing.get_context("spawn")
        self.connection, child_end = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(child_end, make, *args), daemon=True)
        self.process.start()
        child_end.close()

    def turn(self, num):
        """Runs ``num`` steps; returns (last loss, seconds per step), or the costs for `PROFILE`."""
        self.connection.send(num)
        return self.connection.recv()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(0)
        self.process.join()


def costs(step: Callable, hlo: str) -> list[tuple[str, float]]:
    """Returns (location in the code, seconds of all threads) of one traced step, largest first."""
    locations = locations_of(hlo)
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            float(step())
        (path,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(path))
    for line in (line for plane in trace.planes for line in plane.lines):
        enclosing: list[tuple[float, str]] = []  # end and location of the enclosing events
        for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
            location = locations.get(dict(event.stats).get("hlo_op", event.name))
            if location is None:
                continue
            while enclosing and enclosing[-1][0] <= event.start_ns:
                enclosing.pop()
            seconds[location] += event.duration_ns / 1e9
            if enclosing:
                seconds[enclosing[-1][1]] -= event.duration_ns / 1e9
            enclosing.append((event.end_ns, location))
    return seconds.most_common()


def locations_of(hlo: str) -> dict[str, str]:
    """Returns the source line, function and direction (backward) of each instruction, by name."""

    def table(title: str) -> dict[str, str]:
        rows = re.search(rf"^{title}\n((?:\d+ .*\n)*)", hlo, re.MULTILINE)
        return dict(row.split(" ", 1) for row in rows[1].splitlines()) if rows else {}

    def ids(row: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\d+)", row))

    names, functions = table("FileNames"), table("FunctionNames")
    locations = {i: ids(row) for i, row in table("FileLocations").items()}
    frames = {i: ids(row) for i, row in table("StackFrames").items()}

    def location(instruction: str) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", instruction)
        if frame is None:
            return "copies and zeros inserted by XLA"
        at = locations[frames[frame[1]]["file_location_id"]]
        file = Path(names[at["file_name_id"]].strip('"')).name
        function = functions[at["function_name_id"]].strip('"').replace("<locals>.", "")
        backward = " (backward)" if "transpose(" in instruction else ""
        return f"{file}:{at['line']} {function}{backward}"

    matches = re.finditer(r"^ +(?:ROOT )?%([\w.\-]+) = (.*)$", hlo, re.MULTILINE)
    return {match[1]: location(match[2]) for match in matches}


def main() -> None:
    case, rounds = case_of_flags(), flags.FLAGS.rounds
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers")):
        raise cli.UserError("PyTorch and diffusers are required: pip install -e '.[convert]'")
    platform = PLATFORMS[case.device]
    jax.config.update("jax_platforms", platform)
    os.environ |= {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    print(describe(case), flush=True)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        losses: dict[str, list[float]] = {}
        for name in case.sides:
            use_compile = () if name == "ours" else (name == "compiled",)
            make = MAKERS[type(case)][name != "ours"]
            side = Side(make, case, Path(folder), *use_compile)
            try:
                losses[name] = [side.turn(1)[0] for _ in range(WARM_UP)]
            except EOFError:
                if name != "compiled":
                    raise cli.UserError(f"{name} failed; see the error above") from None
                print("compiled: torch.compile failed on this machine; see the error above")
                continue
            sides[name] = side
            stack.callback(side.close)
        check(losses, TOLERANCE[case.dtype])
        times = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                times[name].append(side.turn(case.steps)[1])
        profile = sides["ours"].turn(PROFILE) if flags.FLAGS.profile else []

    report(case, times)
    for location, seconds in profile[:NUM_COSTS]:
        print(f"{1e3 * seconds:10.2f} ms  {location}")


def describe(case: Case | AutoencoderCase) -> str:
    return (
        f"{case}, batch {case.batch}, {case.dtype}, remat {case.remat}, "
        f"{case.flops() / 1e12:.4g} TFLOP per step\n"
        f"on {jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} threads"
    )


def check(losses: dict[str, list[float]], tolerance: float) -> None:
    """Checks that all sides have the same losses."""
    ours = np.array(losses["ours"])
    for name, values in losses.items():
        error = np.max(np.abs(np.array(values) / ours - 1))
        values = ", ".join(f"{x:.6f}" for x in values)
        print(f"losses, {name}: {values}; relative difference {error:.1e}")
        if not error <= tolerance:
            raise cli.UserError(
                f"the losses of {name} differ from ours by more than {tolerance:.0e}."
            )


def report(case: Case | AutoencoderCase, times: dict[str, list[float]]) -> None:
    peak = chip_of(jax.devices()[0].device_kind).peak_flops
    ours = statistics.median(times["ours"])
    print(f"\n{'':10}{'median':>12}{'minimum':>12}{'IQR':>11}{'TFLOP/s':>10}{'MFU':>8}{'ratio':>8}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        low, high = np.percentile(seconds, [25, 75])
        speed = case.flops() / median
        mfu = f"{100 * speed / peak:.1f} %" if peak else "-"
        print(
            f"{name:10}{1e3 * median:9.1f} ms{1e3 * min(seconds):9.1f} ms"
            f"{100 * (high - low) / median:9.1f} %{speed / 1e12:10.3f}{mfu:>8}{median / ours:8.2f}"
        )


if __name__ == "__main__":
    cli.run("benchmark", main)
