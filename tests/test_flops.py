"""The count of FLOPs, against published numbers and against the matmuls that JAX traces."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.flops import forward_flops, linear_maps, training_flops
from kontext_jax.models import lora
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.lora import LoraConfig

TARGET, CONTEXTS, TEXT = 6, 10, 5
ROWS = 2
HEAD_DIM = 16


def config_of(**sizes) -> FluxConfig:
    """A config with several layers, whose sizes all differ so that a mix-up would show."""
    distinct = dict(hidden_size=64, mlp_ratio=3.0, vec_in_dim=40, context_in_dim=56)
    return FluxConfig.tiny(**distinct, axes_dim=(4, 6, 6), remat="none", **sizes)


def matmul_flops(jaxpr) -> int:
    """FLOPs of all matmuls in a jaxpr; bodies of loops count as often as they run.

    Products with a vector do not count: on CPUs, norms have them for their scales. The product with
    the matrix that swaps a head's channels for RoPE does not count either.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (var.aval.shape for var in equation.invars)
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            inner = math.prod(left[i] for i in contracted)
            outer = math.prod(left[i] for i in batch)
            rows = math.prod(left) // inner // outer
            columns = math.prod(right) // inner // outer
            is_rope = right == (HEAD_DIM, HEAD_DIM)
            if min(rows, inner, columns) > 1 and not is_rope:
                total += 2 * outer * rows * inner * columns
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inside = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        total += times * sum(matmul_flops(x) for x in inside if hasattr(x, "eqns"))
    return total


def inputs_of(config: FluxConfig, contexts: int = 0) -> tuple[dict, dict]:
    """Arguments of `Flux` for rows of one example: the ones with gradients, and the layout."""
    image = TARGET + contexts
    floats = {
        "latents": np.zeros((ROWS, image, config.in_channels), np.float32),
        "text": np.zeros((ROWS, TEXT, config.context_in_dim), np.float32),
        "pooled": np.zeros((ROWS, 1, config.vec_in_dim), np.float32),
        "t": np.zeros((ROWS, 1), np.float32),
    }
    if config.guidance_embed:
        floats["guidance"] = np.zeros((ROWS, 1), np.float32)
    layout = {
        "positions": np.zeros((ROWS, image, 3), np.int32),
        "segments": np.ones((ROWS, image), np.int32),
        "text_segments": np.ones((ROWS, TEXT), np.int32),
    }
    return floats, layout


def network_of(config: FluxConfig) -> Flux:
    return nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0)))


def call(model, floats, layout):
    return model(**floats, **layout)


def total(model, floats, layout):
    return jnp.sum(call(model, floats, layout))


@pytest.mark.parametrize(
    ("target", "contexts", "text", "tera"),
    [
        (256, 0, 256, 20.42),  # MLPerf's 256 px; NVIDIA's submission counts 20.3
        (1024, 0, 512, 64.51),  # 512 px
        (4096, 0, 512, 223.15),  # 1024 px; MaxDiffusion's benchmark
        (1024, 1024, 512, 112.98),
        (4096, 4096, 512, 496.37),  # Kontext at 1024 px
    ],
)
@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell()], ids=["dev", "schnell"])
def test_flops_of_flux_match_known_values(config, target, contexts, text, tera):
    flops = training_flops(config, target=target, contexts=contexts, text=text)
    assert round(flops / 1e12, 2) == tera


@pytest.mark.parametrize("guidance", [False, True])
def test_forward_flops_match_the_traced_matmuls(guidance):
    config = config_of(guidance_embed=guidance)
    jaxpr = jax.make_jaxpr(call)(network_of(config), *inputs_of(config))
    expected = forward_flops(config, target=TARGET, contexts=0, text=TEXT)
    assert matmul_flops(jaxpr) == ROWS * expected


def test_only_the_velocity_of_contexts_is_not_counted():
    config = config_of()
    jaxpr = jax.make_jaxpr(call)(network_of(config), *inputs_of(config, CONTEXTS))
    expected = forward_flops(config, target=TARGET, contexts=CONTEXTS, text=TEXT)
    unused = 2 * CONTEXTS * config.hidden_size * config.in_channels
    assert matmul_flops(jaxpr) == ROWS * (expected + unused)


def test_training_flops_match_the_traced_matmuls_and_are_three_times_forward():
    """With gradients of the inputs; without them, the first maps have one matmul fewer."""
    config = config_of(guidance_embed=True)
    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(network_of(config), *inputs_of(config))
    expected = training_flops(config, target=TARGET, contexts=0, text=TEXT)
    assert matmul_flops(jaxpr) == ROWS * expected
    assert expected == 3 * forward_flops(config, target=TARGET, contexts=0, text=TEXT)


@pytest.mark.parametrize("targets", [LoraConfig().targets, ("*",)], ids=["default", "all"])
def test_training_flops_with_adapters_match_the_traced_matmuls(targets, random_network):
    config, adapters = config_of(guidance_embed=True), LoraConfig(rank=3, targets=targets)
    base = random_network(lambda: Flux(config, rngs=nnx.Rngs(0)))

    def adapted(lowrank, floats, layout):
        return total(lora.attach(base, lowrank), floats, layout)

    lowrank = jax.eval_shape(lambda: lora.init(base, adapters, jax.random.key(0)))
    grad = jax.grad(adapted, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(grad)(lowrank, *inputs_of(config))
    expected = training_flops(config, target=TARGET, contexts=0, text=TEXT, lora=adapters)
    assert matmul_flops(jaxpr) == ROWS * expected


def test_linear_maps_has_every_path_of_the_network():
    config = config_of(guidance_embed=True)
    everything = LoraConfig(rank=1, targets=("*",))
    adapters = jax.eval_shape(lambda: lora.init(network_of(config), everything, jax.random.key(0)))
    assert set(linear_maps(config)) == set(adapters)


def test_flops_of_a_packed_batch_are_the_sum_over_its_examples(recipe):
    """Rows with one, no and three examples, every second one with a context; padding is free."""
    flops = jax.jit(recipe.objective.flops)(recipe.rows([1, 0, 3]))
    config = recipe.objective.config.transformer
    expected = sum(training_flops(config, target=4, contexts=4 * (i % 2), text=8) for i in range(4))
    np.testing.assert_allclose(flops, expected, rtol=1e-6)
