"""Shared fixtures. Tests run on eight CPU devices, without implicit dtype or rank promotion."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from flax import nnx

# The networks are tiny, so compilation dominates. Without optimisation it takes half the time, and
# without fusion emitters and parallel code generation, which pay in large programs, half of that.
# On a few busy cores, a device may reach a collective late; by default XLA aborts after 40 s.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags


def _with_promotion(make_optimizer):
    """Lets an optimizer promote dtypes and ranks, which Optax relies on; the rest stays strict."""

    def make(*args, **kwargs):
        optimizer = make_optimizer(*args, **kwargs)

        def update(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return optimizer.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)

    return make


optax.adamw = _with_promotion(optax.adamw)
optax.adafactor = _with_promotion(optax.adafactor)
optax.scale_by_rms = _with_promotion(optax.scale_by_rms)
optax.scale_by_learning_rate = _with_promotion(optax.scale_by_learning_rate)


@pytest.fixture(scope="session")
def emoji_folder() -> Path:
    """The folder of `@iconify-json/*` tarballs: KONTEXT_EMOJI_DIR, or ../shared/data/emoji."""
    default = Path(__file__).parents[2] / "shared" / "data" / "emoji"
    folder = Path(os.environ.get("KONTEXT_EMOJI_DIR", default))
    if not list(folder.glob("*.tgz")):
        pytest.skip(f"no emoji tarballs in {folder}; set KONTEXT_EMOJI_DIR (see the README)")
    return folder


@pytest.fixture(scope="session")
def random_network():
    """A function ``(make_network, seed) -> network`` with random values in every parameter.

    Default zeros and ones would hide mistakes. The values are drawn with NumPy, because XLA takes
    half a minute to compile an autoencoder's initialisation.
    """

    def make(make_network, seed: int = 0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            x, name = rng.standard_normal(leaf.shape, np.float32), jax.tree_util.keystr(path)
            if "kernel" in name:
                fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
                return jnp.asarray(x * fan_in**-0.5, jnp.float32)
            if "embedding" in name:
                return jnp.asarray(x)
            return jnp.asarray(("scale" in name) + 0.2 * x, jnp.float32)

        return jax.tree.map_with_path(draw, jax.eval_shape(make_network))

    return make


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A data set of 32-pixel edits: 40 for training and 6 for validation."""
    from kontext_jax.data import store
    from kontext_jax.toy_data import world

    folder = tmp_path_factory.mktemp("data") / "world"
    splits = {"train": world.triples(40, split="train")}
    store.write(splits | {"validation": world.triples(6, split="validation")}, folder)
    return folder


@pytest.fixture(scope="session")
def flux_tokenizers(tmp_path_factory) -> Path:
    """Small tokenizers in FLUX's layout: CLIP's in ``tokenizer``, T5's in ``tokenizer_2``.

    CLIP's vocabulary is that of `ClipConfig.tiny`: bytes, bytes at the end of a word, six merges,
    start token 518, and end token 519, which also pads. T5's has three words and single characters;
    the pad token is 0 and the end token 1.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5Tokenizer

    folder = tmp_path_factory.mktemp("flux")
    symbols = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("i", "t</w>")]
    merges += [("m", "a"), ("ma", "k"), ("mak", "e</w>")]
    vocab = symbols + [symbol + "</w>" for symbol in symbols] + [a + b for a, b in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer({word: i for i, word in enumerate(vocab)}, merges, model_max_length=77)
    clip.save_pretrained(folder / "tokenizer")

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁make", "▁it", "▁red", *map(chr, range(33, 127))]
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    t5 = T5Tokenizer(scores, extra_ids=0, model_max_length=512)
    t5.save_pretrained(folder / "tokenizer_2")
    return folder


def _new_network(model, config):
    return model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def pipeline_folder(random_network, flux_tokenizers, tmp_path_factory) -> Path:
    """A complete FluxKontextPipeline of tiny networks, with 8 pixels per token."""
    from kontext_jax.flow import TimeConfig
    from kontext_jax.models.autoencoder import AutoencoderConfig
    from kontext_jax.models.clip import ClipConfig
    from kontext_jax.models.flux import FluxConfig
    from kontext_jax.models.t5 import T5Config
    from kontext_jax.weights import export, pipeline
    from kontext_jax.weights.networks import NETWORKS
    from kontext_jax.weights.reading import ArrayReader

    configs = {
        "transformer": FluxConfig(
            in_channels=32, hidden_size=32, num_heads=2, depth=2, depth_single=2, vec_in_dim=32,
            context_in_dim=32, axes_dim=(4, 6, 6),
        ),
        "autoencoder": AutoencoderConfig.tiny(channels=8, latent_channels=8),
        "text_encoder": T5Config(
            vocab_size=104, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
        "clip": ClipConfig.tiny(),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    for seed, (name, config) in enumerate(configs.items()):
        kind = NETWORKS[name]
        network = random_network(functools.partial(_new_network, kind.model, config), seed)
        export.write_diffusers(ArrayReader(kind, network), folder / kind.folder, {})
        if name in pipeline.TOKENIZERS:
            tokenizer = pipeline.TOKENIZERS[name]
            pipeline.write_tokenizer(str(flux_tokenizers / tokenizer), folder / tokenizer)
    pipeline.write_scheduler(folder, TimeConfig())
    pipeline.write_index(folder, configs)
    return folder


class Recipe(NamedTuple):
    """An objective and its networks; ``rows(counts)`` packs ``counts[i]`` examples into row i.

    Images have 16 x 16 pixels and four tokens; with ``side=8``, for a smaller autoencoder, 8 x 8
    pixels and still four tokens. All sizes are multiples of eight, so that eight devices can shard
    every array.
    """

    objective: Any
    params: dict
    frozen: dict
    rows: Callable[..., Any]


@pytest.fixture(scope="session")
def recipe(random_network) -> Recipe:
    """Flow matching with tiny networks, on 16-pixel edits."""
    from kontext_jax.data.packing import PackingConfig, size_key
    from kontext_jax.data.pipeline import DataConfig, assemble
    from kontext_jax.geometry import GeometryConfig
    from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
    from kontext_jax.models.flux import FluxConfig
    from kontext_jax.models.t5 import T5Config
    from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig
    from kontext_jax.types import Example

    config = FlowMatchingConfig(
        train_text_encoder=True,
        pooled="mean",
        transformer=FluxConfig.tiny(
            hidden_size=32,
            num_heads=2,
            depth=1,
            depth_single=1,
            axes_dim=(4, 6, 6),
            vec_in_dim=32,
            context_in_dim=32,
            mlp_ratio=2.0,
            remat="none",
        ),
        text_encoder=T5Config.tiny_bytes(num_layers=1, d_model=32, d_kv=8, d_ff=32, num_heads=8),
    )
    objective = FlowMatching(config)
    frozen_config = AutoencoderConfig.tiny(channels=8)
    params = random_network(lambda: objective.init(jax.random.key(0)))
    autoencoder = random_network(lambda: Autoencoder(frozen_config, rngs=nnx.Rngs(0)))

    def rows(counts: Sequence[int], seed: int = 0, side: int = 16):
        rng = np.random.default_rng(seed)
        data = DataConfig(
            geometry=GeometryConfig(sizes=((side, side),), pixels_per_token=side // 2),
            packing=PackingConfig(image_tokens=24, text_tokens=24, max_examples=3),
        )

        def example(index: int) -> Example:
            images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
            ids = rng.integers(3, 259, 8).astype(np.int32)
            return Example(f"{index}", images[0], tuple(images[1 : 1 + index % 2]), ids)

        assembled, first = [], 0
        for count in counts:
            ids = list(range(first, first + count))
            assembled.append(
                assemble([example(i) for i in ids], ids, {size_key((side, side)): 6}, data)
            )
            first += count
        return jax.tree.map(lambda *leaves: np.stack(leaves), *assembled)

    return Recipe(objective, params, {"autoencoder": autoencoder}, rows)
