"""Compares the time and memory of a training step of LADD and of ADD.

    python launch/distillation_cost.py [--size=128] [--rows=2] [--rounds=5] [--depth=3]

Both train the same student from the same teacher, on rows of one target and one context of the same
size in pixels. LADD reads latents, and its discriminator sees features of the teacher. ADD encodes
and decodes images with FLUX's autoencoder, and its discriminator sees features of DINOv2 (ViT-S at
224 pixels). Weights are random, since the cost of a step does not depend on them. The two steps
alternate in one process; the time is the median. Memory is the peak of the compiled step.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from kontext_jax import cli
from kontext_jax.compile import row_of
from kontext_jax.config import Config
from kontext_jax.data.latents import LatentsConfig
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.dino import Dino, DinoConfig
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.objectives.add import AddConfig
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training.train_state import (
    abstract_state,
    init_state,
    jit_train_step,
    make_optimizers,
)


def configs(size: int, rows: int, depth: int) -> dict[str, Config]:
    """Returns a LADD and an ADD config that differ only in the discriminator's input."""
    transformer = FluxConfig(
        hidden_size=384,
        num_heads=6,
        depth=depth,
        depth_single=2 * depth,
        vec_in_dim=64,
        context_in_dim=64,
        axes_dim=(16, 24, 24),
        guidance_embed=False,
        dtype="float32",
        remat="full",
    )
    networks = dict(transformer=transformer, text_encoder=T5Config.tiny_bytes(), pooled="mean")
    heads = HeadsConfig(width=64, dtype="float32")
    tokens = (size // 16) ** 2
    data = DataConfig(
        batch_size=rows,
        caption_dropout=0.0,
        geometry=GeometryConfig(sizes=((size, size),)),
        packing=PackingConfig(image_tokens=2 * tokens, text_tokens=64, max_examples=1),
        text=TextConfig(max_tokens=64),
    )
    latents = LatentsConfig(path="latents", samples=1.0)
    pixels = AddConfig(**networks, heads=heads, dino=DinoConfig.vits14(dtype="float32"))
    return {
        "LADD": Config(
            objective=LaddConfig(**networks, heads=heads),
            data=dataclasses.replace(data, latents=latents),
        ),
        "ADD": Config(objective=pixels, data=data),
    }


def frozen_of(config: Config) -> dict:
    """Returns the shapes of the frozen networks that the objective uses, by name."""
    kinds = {
        "autoencoder": (Autoencoder, AutoencoderConfig.flux(dtype="float32")),
        "teacher": (Flux, config.objective.transformer),
        "text_encoder": (T5Encoder, config.objective.text_encoder),
        "dino": (Dino, getattr(config.objective, "dino", None)),
    }
    unused = {"autoencoder"} if config.data.latents.path else set()
    return {
        name: nnx.eval_shape(lambda n=name: kinds[n][0](kinds[n][1], rngs=nnx.Rngs(0)))
        for name in config.make_objective().frozen()
        if name not in unused
    }


def random_weights(tree):
    """Returns random arrays with the shapes of ``tree``, with the scale of weights."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), tree
    )


class Recipe:
    """The compiled train step of an objective, and its arguments."""

    def __init__(self, config: Config):
        objective = config.make_objective()
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        optimizers = make_optimizers(objective, config.optim, config.num_steps)
        _, shardings = abstract_state(objective, optimizers, mesh)
        rows = config.data.batch_size
        self._batch = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * rows), row_of(config))
        self._state = init_state(objective, optimizers, mesh, seed=0)
        self._frozen = random_weights(frozen_of(config))
        step = jit_train_step(objective, optimizers, config.optim, 0, shardings)
        with jax.set_mesh(mesh):
            self._step = step.lower(self._state, self._frozen, self._batch).compile()

    def run(self) -> float:
        """Runs a step and returns its time in seconds."""
        start = time.monotonic()
        self._state, _ = jax.block_until_ready(self._step(self._state, self._frozen, self._batch))
        return time.monotonic() - start

    def memory(self) -> dict[str, float]:
        """Returns the peak memory in GB, and the part of it that is temporary."""
        usage = self._step.memory_analysis()
        temporaries = usage.temp_size_in_bytes
        outputs = usage.output_size_in_bytes - usage.alias_size_in_bytes
        peak = usage.argument_size_in_bytes + outputs + temporaries
        return {"peak": peak / 1e9, "temporaries": temporaries / 1e9}


def main() -> None:
    options = flags.FLAGS
    recipes = {
        name: Recipe(c) for name, c in configs(options.size, options.rows, options.depth).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for round_number in range(options.rounds + 1):
        for name, recipe in recipes.items():
            duration = recipe.run()
            if round_number:  # the first round is a warm-up
                seconds[name].append(duration)
    for name, recipe in recipes.items():
        memory = recipe.memory()
        print(
            f"{name:5} {statistics.median(seconds[name]):8.2f} s per step, "
            f"{memory['peak']:.2f} GB, {memory['temporaries']:.2f} GB of it temporary"
        )
    ratio = statistics.median(seconds["ADD"]) / statistics.median(seconds["LADD"])
    print(f"ADD / LADD: {ratio:.2f} times the time")


if __name__ == "__main__":
    flags.DEFINE_integer("size", 128, "height and width in pixels, a multiple of 16")
    flags.DEFINE_integer("rows", 2, "rows per step")
    flags.DEFINE_integer("depth", 3, "double blocks; there are twice as many single blocks")
    flags.DEFINE_integer("rounds", 5, "number of timed steps of each objective")
    cli.run("distillation_cost", main)
