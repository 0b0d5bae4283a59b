"""Tests of the readers: which files are accepted, and the messages for all others."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights import autoencoder, clip, dino, flux
from kontext_jax.weights.export import write_bfl, write_orbax
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.networks import ALL_NETWORKS, NETWORKS, architecture
from kontext_jax.weights.reading import OrbaxReader, open_file, open_folder, read_config
from tests.weights.small import CONFIGS, assert_same, reader_of, save_folder, tensors_of

FORMATS = {name: network.format for name, network in ALL_NETWORKS.items()}


def refusal(function, *args) -> str:
    """Returns the message, one sentence, that a call fails with."""
    with pytest.raises((WeightsError, FileNotFoundError)) as error:
        function(*args)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_a_folder_round_trips_a_network(networks, tmp_path, name):
    reader = open_folder(save_folder(tmp_path, networks[name]))
    assert architecture(reader.config) == architecture(CONFIGS[name])
    assert_same(reader, reader_of(networks[name]))


@pytest.mark.parametrize("name", ["transformer", "autoencoder"])
def test_a_bfl_file_round_trips_a_network_by_its_metadata(networks, tmp_path, name):
    """The sizes are not FLUX's, so the tensors alone do not determine the config."""
    expected = reader_of(networks[name])
    write_bfl(expected, tmp_path / "file.safetensors", {"step": 3})
    reader = open_file(tmp_path / "file.safetensors")
    assert architecture(reader.config) == architecture(CONFIGS[name])
    assert reader.record["step"] == 3
    assert_same(reader, expected)


def test_one_message_names_everything_that_does_not_fit(networks, tmp_path):
    tensors = tensors_of(networks["transformer"], "diffusers")
    del tensors["x_embedder.weight"], tensors["transformer_blocks.1.attn.to_k.weight"]
    tensors["pos_embed"] = np.zeros(3, np.float32)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].T
    tensors["context_embedder.bias"] = tensors["context_embedder.bias"].astype(np.float64)
    tensors["norm_out.linear.bias"] = tensors["norm_out.linear.bias"].astype(np.int64)
    half = "single_transformer_blocks.2.proj_mlp.bias"
    tensors[half] = tensors[half].astype(np.float16)
    save_folder(tmp_path, networks["transformer"], tensors)
    message = refusal(open_folder, tmp_path)
    assert message.startswith(f"The weights in {tmp_path} do not fit this transformer: ")
    assert sorted(message.removesuffix(".").split(": ", 1)[1].split("; ")) == [
        "context_embedder.bias is F64, not F32, BF16, F16",
        "double_blocks/img_attn/qkv/kernel is only partly stored",
        "norm_out.linear.bias is I64, not F32, BF16, F16",
        "pos_embed is unexpected",
        "proj_out.weight is (16, 8), not (8, 16)",
        f"{half} is F16, unlike other tensors of single_blocks/linear1/bias",
        "transformer_blocks.1.attn.to_k.weight is missing",
        "x_embedder.weight is missing",
    ]


def test_except_for_allows_missing_and_unexpected_tensors(networks, tmp_path):
    tensors = tensors_of(networks["clip"], "diffusers")
    missing = "text_model.final_layer_norm.bias"
    del tensors[missing]
    tensors |= {"text_model.adapter.0": np.zeros(2), "text_model.adapter.1": np.zeros(2, int)}
    save_folder(tmp_path, networks["clip"], tensors)
    reader = open_folder(tmp_path, except_for=(missing, "*.adapter.*"))
    expected = reader_of(networks["clip"])
    assert expected.dtypes.keys() - reader.dtypes.keys() == {"final_norm/bias"}
    key = ("final_norm/scale", None)
    np.testing.assert_array_equal(reader.read(key), expected.read(key))
    assert "text_model.adapter.0 is unexpected" in refusal(open_folder, tmp_path, (missing,))
    assert f"{missing} is missing" in refusal(open_folder, tmp_path, ("*adapter*",))


def test_tensors_in_except_for_are_not_read_even_if_stored(networks, tmp_path):
    tensors = tensors_of(networks["clip"], "diffusers")
    tensors["text_model.final_layer_norm.bias"] = np.zeros(3, np.float32)
    save_folder(tmp_path, networks["clip"], tensors)
    assert "final_layer_norm.bias is (3,), not (16,)" in refusal(open_folder, tmp_path)
    reader = open_folder(tmp_path, ("*final_layer_norm.bias",))
    assert set(reader.network.shapes(reader.config)) - set(reader.dtypes) == {"final_norm/bias"}


@pytest.mark.parametrize(
    ("missing", "param"),
    [
        ("transformer_blocks.1.norm1.linear.weight", "double_blocks/img_mod/lin/kernel"),
        ("single_transformer_blocks.0.proj_mlp.bias", "single_blocks/linear1/bias"),
    ],
)
def test_a_partly_stored_parameter_is_refused(networks, tmp_path, missing, param):
    tensors = tensors_of(networks["transformer"], "diffusers")
    del tensors[missing]
    save_folder(tmp_path, networks["transformer"], tensors)
    message = refusal(open_folder, tmp_path, (missing,))
    assert message.endswith(f"do not fit this transformer: {param} is only partly stored.")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("transformer", "model.diffusion_model."),
        ("autoencoder", "first_stage_model."),
        ("autoencoder", "vae."),
    ],
)
def test_prefixes_of_tensor_names_are_ignored(networks, tmp_path, name, prefix):
    path = tmp_path / "plain.safetensors"
    write_bfl(reader_of(networks[name]), path, {})
    metadata = {"kontext_jax": json.dumps(open_file(path).record)}
    tensors = {prefix + n: t for n, t in tensors_of(networks[name], "bfl").items()}
    save_file(tensors, tmp_path / "prefixed.safetensors", metadata)
    assert_same(open_file(tmp_path / "prefixed.safetensors"), reader_of(networks[name]))


def test_clip_is_read_with_and_without_prefix_and_from_a_full_clip(networks, tmp_path):
    expected = reader_of(networks["clip"])
    tensors = tensors_of(networks["clip"], "diffusers")
    short = {name.removeprefix("text_model."): array for name, array in tensors.items()}
    others = {
        "vision_model.embeddings.class_embedding": np.zeros(3, np.float32),
        "visual_projection.weight": np.zeros((2, 2), np.float32),
        "text_projection.weight": np.zeros((2, 2), np.float32),
        "text_model.embeddings.position_ids": np.arange(6)[None],
        "logit_scale": np.zeros((), np.float32),
    }
    for i, stored in enumerate((tensors, short, tensors | others)):
        (tmp_path / f"{i}").mkdir()
        folder = save_folder(tmp_path / f"{i}", networks["clip"], stored)
        assert_same(open_folder(folder), expected)


def test_t5_encoder_is_read_from_a_full_t5(networks, tmp_path):
    tensors = tensors_of(networks["text_encoder"], "diffusers")
    others = {
        "encoder.embed_tokens.weight": tensors["shared.weight"].copy(),
        "decoder.embed_tokens.weight": tensors["shared.weight"].copy(),
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((2, 2), np.float32),
        "lm_head.weight": np.zeros((2, 2), np.float32),
    }
    save_folder(tmp_path, networks["text_encoder"], tensors | others)
    assert_same(open_folder(tmp_path), reader_of(networks["text_encoder"]))


def test_a_tensor_with_and_without_its_prefix_is_refused(networks, tmp_path):
    tensors = tensors_of(networks["clip"], "diffusers")
    stored = "text_model.final_layer_norm.bias"
    tensors[stored.removeprefix("text_model.")] = tensors[stored] + 1
    save_folder(tmp_path, networks["clip"], tensors)
    assert refusal(open_folder, tmp_path).startswith(f"{tmp_path} has {stored} twice, as ")


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_configs_round_trip_through_json(name):
    full = {
        "transformer": FluxConfig.schnell(),
        "autoencoder": AutoencoderConfig.flux(),
        "text_encoder": T5Config.xxl(),
        "clip": ClipConfig.large(),
        "dino": DinoConfig.vitl14(),
    }[name]
    for config in (full, CONFIGS[name]):
        values = json.loads(json.dumps(FORMATS[name].to_json(config)))
        assert architecture(FORMATS[name].from_json(values)) == architecture(config)


def test_published_configs_of_dev_schnell_and_kontext_are_read():
    """Those of [dev] and [schnell] have no axes_dims_rope; Kontext's does."""
    published = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    }
    assert flux.from_json(published) == FluxConfig.dev()
    assert flux.from_json(published | {"guidance_embeds": False}) == FluxConfig.schnell()
    kontext = published | {"axes_dims_rope": [16, 56, 56], "out_channels": None}
    assert flux.from_json(kontext) == FluxConfig.dev()


def test_clip_s_legacy_eos_id_stands_for_the_last_id():
    values = clip.to_json(ClipConfig.large())
    assert clip.from_json(values | {"eos_token_id": 2}) == ClipConfig.large()
    assert clip.from_json({"model_type": "clip", "text_config": values}) == ClipConfig.large()


def test_published_configs_of_dino_are_read():
    published = {
        "model_type": "dinov2",
        "hidden_act": "gelu",
        "hidden_size": 384,
        "image_size": 518,
        "layer_norm_eps": 1e-6,
        "mlp_ratio": 4,
        "num_attention_heads": 6,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 14,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }
    assert dino.from_json(published) == DinoConfig.vits14()
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    assert dino.from_json(published | large) == DinoConfig.vitl14()


def test_dino_is_read_from_a_classifier_with_newer_names(networks, tmp_path):
    newer = {value: key for key, value in dino.RENAMED.items()}
    tensors = {"classifier.weight": np.zeros((2, 32), np.float32)}
    for name, tensor in tensors_of(networks["dino"], "diffusers").items():
        for old, new in newer.items():
            name = name.replace(old, new)
        tensors[f"dinov2.{name}"] = tensor
    tensors["dinov2.embeddings.mask_token"] = np.zeros((1, 16), np.float32)
    assert "dinov2.encoder.layer.2.attention.o_proj.bias" in tensors
    reader = open_folder(save_folder(tmp_path, networks["dino"], tensors))
    assert_same(reader, reader_of(networks["dino"]))


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        (
            "transformer",
            {"in_channels": 384, "out_channels": 64},
            "cannot be used: it has patch_size 1 and out_channels 64 for in_channels 384; FLUX.1 "
            "and Kontext have patch_size 1 and equal in and out channels (Fill, Canny and Depth "
            "do not).",
        ),
        ("transformer", {"num_layers": None}, "lacks 'num_layers'."),
        ("transformer", {"attention_head_dim": 10}, "cannot be used: axes_dim (2, 2, 4) must be "),
        (
            "transformer",
            {"axes_dims_rope": 7},
            "has a setting of the wrong type ('int' object is not iterable).",
        ),
        (
            "text_encoder",
            {"feed_forward_proj": "relu"},
            "cannot be used: it has feed_forward_proj relu and layer_norm_epsilon 1e-06; FLUX's ",
        ),
        ("text_encoder", {"feed_forward_proj": None}, "it has feed_forward_proj relu"),
        ("text_encoder", {"d_kv": None}, "lacks 'd_kv'."),
        (
            "clip",
            {"hidden_act": "gelu"},
            "cannot be used: it has hidden_act gelu and layer_norm_eps 1e-05; FLUX's text encod",
        ),
        ("clip", {"num_hidden_layers": None}, "lacks 'num_hidden_layers'."),
        (
            "autoencoder",
            {"use_quant_conv": True, "act_fn": "relu"},
            "FLUX.1's autoencoder does not support act_fn = relu, use_post_quant_conv = False.",
        ),
        (
            "autoencoder",
            {"block_out_channels": [8, 20]},
            "does not support block_out_channels = [8, 20].",
        ),
        ("autoencoder", {"shift_factor": None}, "lacks 'shift_factor'."),
        (
            "dino",
            {"use_swiglu_ffn": True, "patch_size": 16},
            "cannot be used: DINOv2's ViT-S, ViT-B and ViT-L do not support patch_size = 16, "
            "use_swiglu_ffn = True.",
        ),
        ("dino", {"image_size": 500}, "cannot be used: trained_size 500 must be a multiple of 14"),
        ("dino", {"mlp_ratio": None}, "lacks 'mlp_ratio'."),
    ],
)
def test_unsupported_settings_are_refused(networks, tmp_path, name, changed, sentence):
    """None removes a setting."""
    path = save_folder(tmp_path, networks[name]) / "config.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in values.items() if changed.get(k, k) is not None}))
    message = refusal(open_folder, tmp_path)
    assert message.startswith(f"{path} ") and sentence in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "{path} does not exist."),
        ("{", "{path} is not valid JSON ("),
        ("[]", "{path} is not a JSON object."),
        (
            "{}",
            "{path} describes no network; supported are FluxTransformer2DModel, AutoencoderKL, ",
        ),
        (
            '{"_class_name": "UNet2DConditionModel"}',
            "{path} describes UNet2DConditionModel; supported are",
        ),
        ('{"model_type": "bert"}', "{path} describes bert; supported are"),
    ],
)
def test_an_invalid_or_unsupported_config_is_refused(networks, tmp_path, text, sentence):
    path = save_folder(tmp_path, networks["clip"]) / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert refusal(open_folder, tmp_path).startswith(sentence.format(path=path))


def test_read_config_returns_any_json_object_unchanged(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "夜", "more": [1]}')
    assert read_config(tmp_path) == {"_class_name": "夜", "more": [1]}


@pytest.mark.parametrize(
    ("name", "config", "format"),
    [
        ("transformer", FluxConfig.dev(), flux),
        ("transformer", FluxConfig.schnell(), flux),
        ("transformer", FluxConfig.dev(depth=3, depth_single=11, mlp_ratio=2.5), flux),
        ("autoencoder", AutoencoderConfig.flux(), autoencoder),
        (
            "autoencoder",
            AutoencoderConfig.flux(channels=64, channel_multipliers=(1, 2), latent_channels=4),
            autoencoder,
        ),
    ],
)
def test_configs_follow_from_the_tensor_shapes_of_a_bfl_file(name, config, format):
    """At full size, with shapes but no arrays."""
    assert format.from_shapes(NETWORKS[name].table(config, "bfl").tensors()) == config


def save_bfl(path, config, *without: str):
    """Writes a BFL file of zeros without our metadata and without some tensors."""
    shapes = NETWORKS["transformer"].table(config, "bfl").tensors()
    tensors = {n: np.zeros(s, np.float32) for n, s in shapes.items() if not n.startswith(without)}
    save_file(tensors, path)
    return tensors


ONE_HEAD = FluxConfig.dev(
    in_channels=4, hidden_size=128, num_heads=1, depth=1, depth_single=1, mlp_ratio=0.5,
    vec_in_dim=4, context_in_dim=4,
)  # fmt: skip


def test_a_bfl_file_without_our_metadata_is_read(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_bfl(path, ONE_HEAD)
    assert open_file(path).config == ONE_HEAD


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        ("single_blocks.", "lacks the tensor 'single_blocks.0'."),
        ("vector_in.in_layer.weight", "lacks the tensor 'vector_in.in_layer.weight'."),
        ("double_blocks.", "holds neither a transformer nor an autoencoder in Black Forest Labs'"),
        ("final_layer.linear.bias", "final_layer.linear.bias is missing."),
    ],
)
def test_an_incomplete_bfl_file_is_refused(tmp_path, without, sentence):
    path = tmp_path / "flux.safetensors"
    save_bfl(path, ONE_HEAD, without)
    message = refusal(open_file, path)
    assert str(path) in message and sentence in message


def test_a_bfl_file_of_fill_is_refused(tmp_path):
    path = tmp_path / "fill.safetensors"
    tensors = save_bfl(path, ONE_HEAD)
    save_file(tensors | {"img_in.weight": np.zeros((128, 24), np.float32)}, path)
    assert "final_layer.linear.weight is (4, 128), not (24, 128)" in refusal(open_file, path)


def test_a_bfl_file_with_another_head_dimension_is_refused(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_bfl(path, CONFIGS["transformer"])
    assert refusal(open_file, path).startswith(
        f"{path} cannot be used: its heads have 8 channels, not 128, and the file does not say how"
    )


def test_a_bfl_autoencoder_with_other_widths_is_refused(networks, tmp_path):
    path = tmp_path / "ae.safetensors"
    save_file(tensors_of(networks["autoencoder"], "bfl"), path)
    assert refusal(open_file, path).startswith(
        f"{path} cannot be used: channels 8 must be a multiple of num_groups 32"
    )


def test_an_orbax_checkpoint_of_another_network_is_refused(networks, tmp_path):
    reader = reader_of(networks["text_encoder"])
    write_orbax({"text_encoder": reader}, tmp_path, 0, {})
    item, network = tmp_path / "checkpoints" / "0" / "params", reader.network
    other = dataclasses.replace(reader.config, num_layers=3, vocab_size=18)
    message = refusal(OrbaxReader, item, ["text_encoder"], network, other, {})
    assert message.startswith(f"The weights in {item} do not fit this text_encoder: ")
    assert "shared/embedding is (16, 16), not (18, 16)" in message
    assert "blocks/mlp/wo/kernel is (2, 24, 16), not (3, 24, 16)" in message
    message = refusal(OrbaxReader, item, ["clip"], network, reader.config, {})
    assert message.count(" is missing") == len(named_leaves(networks["text_encoder"]))
