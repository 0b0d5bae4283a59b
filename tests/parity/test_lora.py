"""Compares adapters with peft and diffusers, which read our files and write files that we read."""

import jax
import numpy as np
import pytest

from kontext_jax.models import lora
from kontext_jax.models.lora import LoraConfig
from kontext_jax.weights.lora import MergedReader, read_lora, write_lora
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader
from tests.parity import draws, ours

REASON = "needs the convert extra: pip install -e '.[convert]'"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow

OURS = {
    "diffusers' targets": [LoraConfig(rank=4, alpha=6.0)],
    "all maps": [LoraConfig(rank=3, alpha=1.5, targets=("*",))],
    "the last maps": [LoraConfig(rank=2, alpha=3.0, targets=("final_layer/*",))],
    "ranks and alphas that differ": [
        LoraConfig(rank=4, alpha=6.0, targets=("double_blocks/*",)),
        LoraConfig(rank=2, alpha=0.7, targets=("single_blocks/linear?",)),
        LoraConfig(rank=5, alpha=6.0, targets=("final_layer/linear", "*_in*")),
    ],
}

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
ADDED = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
MLPS = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
THEIRS = {
    "the training script's targets": dict(
        r=4, lora_alpha=8, target_modules=ATTENTION + ADDED + MLPS
    ),
    "queries and values": dict(r=2, lora_alpha=3, target_modules=["to_q", "to_v"]),
    "all maps, rank-stabilised": dict(
        r=3, lora_alpha=2, target_modules="all-linear", use_rslora=True
    ),
    "patterns": dict(
        r=4,
        lora_alpha=4,
        target_modules=[*ATTENTION, "proj_out", "norm_out.linear", "x_embedder"],
        rank_pattern={"attn.to_q": 2, "^transformer_blocks.1.attn.to_v": 6},
        alpha_pattern={"to_k": 1, "^proj_out": 9},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """diffusers' transformer in a folder, ours with the same weights, and examples for both."""
    folder = theirs.save(theirs.transformer(), tmp_path_factory.mktemp("base"))
    model = ours.load(folder, "transformer")
    return folder, model, draws.examples("packed", model.config)


@pytest.fixture
def complaints(monkeypatch):
    """The warnings and errors that diffusers logs; pytest already fails on Python's warnings."""
    logged = []
    for name in ("loaders.peft", "loaders.lora_base", "loaders.lora_pipeline", "utils.peft_utils"):
        logger = diffusers.utils.logging.get_logger(f"diffusers.{name}")
        monkeypatch.setattr(logger, "warning", logged.append)
        monkeypatch.setattr(logger, "error", logged.append)
    return logged


def network_of(folder):
    return diffusers.FluxTransformer2DModel.from_pretrained(folder).eval()


SINUSOIDS = (
    "time_in/in",
    "guidance_in/in",
    "timestep_embedder.linear_1",
    "guidance_embedder.linear_1",
)


def drawn(name, shape):
    """Returns a tensor of an adapter; small after sinusoids, for the reason in `draws.weight`."""
    size = 0.02 if any(part in name for part in SINUSOIDS) else 0.12
    return np.float32(size) * draws.normal(name, *shape)


def random_adapters(network, configs):
    """Returns adapters with a nonzero ``b``, as after training."""
    adapters = {}
    for config in configs:
        adapters |= jax.eval_shape(lambda c=config: lora.init(network, c, jax.random.key(0)))
    named = jax.tree_util.tree_map_with_path
    return named(lambda path, x: drawn(jax.tree_util.keystr(path), x.shape), adapters)


def adapted(folder, **settings):
    """Returns diffusers' transformer with an adapter of peft, as after training."""
    network = network_of(folder)
    network.add_adapter(peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, param in network.named_parameters():
            if "lora_" in name:
                param.copy_(torch.from_numpy(drawn(name, param.shape)))
    return network


def compare(model, network, examples, base):
    """Asserts that velocities agree and differ from those without adapters."""
    expected = theirs.velocity(network, examples)
    assert np.abs(expected - ours.velocity(base, examples)).max() > 0.05
    np.testing.assert_allclose(ours.velocity(model, examples), expected, atol=2e-5)


@pytest.mark.parametrize("configs", OURS.values(), ids=OURS)
def test_diffusers_transformer_reads_our_file(base, tmp_path, complaints, configs):
    folder, model, examples = base
    adapters = random_adapters(model, configs)
    write_lora(adapters, model.config, tmp_path, {})
    network = network_of(folder)
    network.load_lora_adapter(tmp_path, use_safetensors=True)
    compare(lora.attach(model, adapters), network, examples, model)
    assert complaints == []


def test_diffusers_pipeline_reads_our_file(base, tmp_path, complaints):
    folder, model, examples = base
    adapters = random_adapters(model, OURS["ranks and alphas that differ"])
    write_lora(adapters, model.config, tmp_path, {})
    pipeline = pipeline_of(network_of(folder))
    pipeline.load_lora_weights(tmp_path)
    compare(lora.attach(model, adapters), pipeline.transformer, examples, model)
    # diffusers warns about every file that only has adapters of the transformer.
    assert len(complaints) == 1 and "prefix='text_encoder'" in complaints[0]


def pipeline_of(network):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxKontextPipeline(transformer=network, scheduler=scheduler, **parts)


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("saved_by", ["pipeline", "transformer"])
def test_we_read_diffusers_files(base, tmp_path, saved_by, settings):
    folder, model, examples = base
    network = adapted(folder, **settings)
    if saved_by == "transformer":
        network.save_lora_adapter(tmp_path)
    else:
        diffusers.FluxKontextPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=peft.get_peft_model_state_dict(network),
            transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
        )
    adapters = read_lora(tmp_path, model.config)
    compare(lora.attach(model, adapters), network, examples, model)


def test_we_read_diffusers_files_without_metadata(base, tmp_path):
    """The format before diffusers 0.34, in which alpha is the rank."""
    folder, model, examples = base
    network = adapted(folder, r=3, lora_alpha=3, target_modules=ATTENTION)
    layers = peft.get_peft_model_state_dict(network)
    diffusers.FluxKontextPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    adapters = read_lora(tmp_path, model.config)
    compare(lora.attach(model, adapters), network, examples, model)


def test_a_file_round_trips_through_our_fused_adapters(base, tmp_path, complaints):
    """Fusing raises the ranks and does not change the function."""
    folder, model, examples = base
    network = adapted(folder, **THEIRS["patterns"])
    network.save_lora_adapter(tmp_path / "theirs")
    adapters = read_lora(tmp_path / "theirs", model.config)
    write_lora(adapters, model.config, tmp_path / "ours", {})
    reloaded = network_of(folder)
    reloaded.load_lora_adapter(tmp_path / "ours", use_safetensors=True)
    expected = theirs.velocity(network, examples)
    np.testing.assert_allclose(theirs.velocity(reloaded, examples), expected, atol=2e-5)
    assert complaints == []


def test_merged_kernels_equal_diffusers(base, tmp_path):
    folder, model, _ = base
    adapters = random_adapters(model, OURS["all maps"])
    write_lora(adapters, model.config, tmp_path, {})
    network = network_of(folder)
    network.load_lora_adapter(tmp_path, use_safetensors=True)
    network.fuse_lora()
    network.unload_lora()
    transformer = NETWORKS["transformer"]
    merged = MergedReader(ArrayReader(transformer, model), adapters)
    expected = {name: param.detach().numpy() for name, param in network.named_parameters()}
    for key, pieces in transformer.table(model.config, "diffusers").pieces.items():
        for piece in pieces:
            actual = piece.to_tensor(merged.read(key))
            np.testing.assert_allclose(actual, expected[piece.name], rtol=1e-6, atol=1e-6)
