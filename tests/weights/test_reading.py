"""What files must hold to be read as one of our networks, and all that is said if they do not."""

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


def refusal(opening, *args) -> str:
    """The one sentence that it fails with."""
    with pytest.raises((WeightsError, FileNotFoundError)) as error:
        opening(*args)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_a_folder_gives_the_network_back(networks, tmp_path, name):
    reader = open_folder(save_folder(tmp_path, networks[name]))
    assert architecture(reader.config) == architecture(CONFIGS[name])
    assert_same(reader, reader_of(networks[name]))


@pytest.mark.parametrize("name", ["transformer", "autoencoder"])
def test_a_file_gives_the_network_back_by_what_its_metadata_says(networks, tmp_path, name):
    """Sizes that are not FLUX's, which the tensors alone do not tell."""
    expected = reader_of(networks[name])
    write_bfl(expected, tmp_path / "file.safetensors", {"step": 3})
    reader = open_file(tmp_path / "file.safetensors")
    assert architecture(reader.config) == architecture(CONFIGS[name])
    assert reader.record["step"] == 3
    assert_same(reader, expected)


def test_everything_that_does_not_fit_is_said_at_once(networks, tmp_path):
    tensors = tensors_of(networks["transformer"], "diffusers")
    del tensors["x_embedder.weight"], tensors["transformer_blocks.1.attn.to_k.weight"]
    tensors["pos_embed"] = np.zeros(3, np.float32)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].T
    tensors["context_embedder.bias"] = tensors["context_embedder.bias"].astype(np.float64)
    tensors["norm_out.linear.bias"] = tensors["norm_out.linear.bias"].astype(np.int64)
    half = "single_transformer_blocks.2.proj_mlp.bias"
    tensors[half] = tensors[half].astype(np.float16)
    save_folder(tmp_path, networks["transformer"], tensors)
    said = refusal(open_folder, tmp_path)
    assert said.startswith(f"The weights in {tmp_path} do not fit this transformer: ")
    assert sorted(said.removesuffix(".").split(": ", 1)[1].split("; ")) == [
        "context_embedder.bias is F64, not F32, BF16, F16",
        "double_blocks/img_attn/qkv/kernel is there in part",
        "norm_out.linear.bias is I64, not F32, BF16, F16",
        "pos_embed is not wanted",
        "proj_out.weight is (16, 8), not (8, 16)",
        f"{half} is F16, other layers or parts are not",
        "transformer_blocks.1.attn.to_k.weight is missing",
        "x_embedder.weight is missing",
    ]


def test_patterns_excuse_what_is_missing_and_what_is_not_wanted(networks, tmp_path):
    tensors = tensors_of(networks["clip"], "diffusers")
    missing = "text_model.final_layer_norm.bias"
    del tensors[missing]
    tensors |= {"text_model.adapter.0": np.zeros(2), "text_model.adapter.1": np.zeros(2, int)}
    save_folder(tmp_path, networks["clip"], tensors)
    reader = open_folder(tmp_path, except_for=(missing, "*.adapter.*"))
    expected = reader_of(networks["clip"])
    assert expected.dtypes.keys() - reader.dtypes.keys() == {"final_norm/bias"}
    place = ("final_norm/scale", None)
    np.testing.assert_array_equal(reader.read(place), expected.read(place))
    assert "text_model.adapter.0 is not wanted" in refusal(open_folder, tmp_path, (missing,))
    assert f"{missing} is missing" in refusal(open_folder, tmp_path, ("*adapter*",))


def test_excepted_tensors_are_not_read_whatever_they_are(networks, tmp_path):
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
def test_a_parameter_is_there_or_not_but_never_in_part(networks, tmp_path, missing, param):
    tensors = tensors_of(networks["transformer"], "diffusers")
    del tensors[missing]
    save_folder(tmp_path, networks["transformer"], tensors)
    said = refusal(open_folder, tmp_path, (missing,))
    assert said.endswith(f"do not fit this transformer: {param} is there in part.")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("transformer", "model.diffusion_model."),
        ("autoencoder", "first_stage_model."),
        ("autoencoder", "vae."),
    ],
)
def test_prefixes_of_other_programs_files_are_left_out(networks, tmp_path, name, prefix):
    path = tmp_path / "plain.safetensors"
    write_bfl(reader_of(networks[name]), path, {})
    metadata = {"kontext_jax": json.dumps(open_file(path).record)}
    tensors = {prefix + n: t for n, t in tensors_of(networks[name], "bfl").items()}
    save_file(tensors, tmp_path / "prefixed.safetensors", metadata)
    assert_same(open_file(tmp_path / "prefixed.safetensors"), reader_of(networks[name]))


def test_clip_is_read_with_and_without_the_name_of_its_half(networks, tmp_path):
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


def test_t5_is_read_out_of_a_whole_t5(networks, tmp_path):
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
    said = refusal(open_folder, tmp_path)
    assert said.startswith(f"{tmp_path} has {stored} twice: as ")


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_full_size_settings_survive_their_json(name):
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


def test_dev_and_schnell_are_known_by_the_configs_they_were_published_with():
    """They name no axes_dims_rope; Kontext's does."""
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


def test_clip_s_old_end_of_text_is_the_last_of_its_vocabulary():
    values = clip.to_json(ClipConfig.large())
    assert clip.from_json(values | {"eos_token_id": 2}) == ClipConfig.large()
    assert clip.from_json({"model_type": "clip", "text_config": values}) == ClipConfig.large()


def test_dino_is_known_by_the_config_it_was_published_with():
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


def test_dino_is_read_from_classifiers_and_under_newer_names(networks, tmp_path):
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
            "and Kontext have patch_size 1 and as many channels out as in (Fill, Canny and Depth "
            "do not).",
        ),
        ("transformer", {"num_layers": None}, "says nothing of 'num_layers'."),
        ("transformer", {"attention_head_dim": 10}, "cannot be used: axes_dim (2, 2, 4) must be "),
        ("transformer", {"axes_dims_rope": 7}, "has a wrong type ('int' object is not iterable)."),
        (
            "text_encoder",
            {"feed_forward_proj": "relu"},
            "cannot be used: it has feed_forward_proj relu and layer_norm_epsilon 1e-06; T5 v1.1, ",
        ),
        ("text_encoder", {"feed_forward_proj": None}, "it has feed_forward_proj relu"),
        ("text_encoder", {"d_kv": None}, "says nothing of 'd_kv'."),
        (
            "clip",
            {"hidden_act": "gelu"},
            "cannot be used: it has hidden_act gelu and layer_norm_eps 1e-05; OpenAI's CLIP, ",
        ),
        ("clip", {"num_hidden_layers": None}, "says nothing of 'num_hidden_layers'."),
        (
            "autoencoder",
            {"use_quant_conv": True, "act_fn": "relu"},
            "FLUX.1's autoencoder has no act_fn = relu, use_quant_conv = True.",
        ),
        ("autoencoder", {"block_out_channels": [8, 20]}, "has no block_out_channels = [8, 20]."),
        ("autoencoder", {"shift_factor": None}, "says nothing of 'shift_factor'."),
        (
            "dino",
            {"use_swiglu_ffn": True, "patch_size": 16},
            "cannot be used: DINOv2's ViT-S, ViT-B and ViT-L have no patch_size = 16, "
            "use_swiglu_ffn = True.",
        ),
        ("dino", {"image_size": 500}, "cannot be used: trained_size 500 must be a multiple of a p"),
        ("dino", {"mlp_ratio": None}, "says nothing of 'mlp_ratio'."),
    ],
)
def test_settings_that_are_not_flux_s_are_refused(networks, tmp_path, name, changed, sentence):
    """None stands for a setting that is left out."""
    path = save_folder(tmp_path, networks[name]) / "config.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in values.items() if changed.get(k, k) is not None}))
    said = refusal(open_folder, tmp_path)
    assert said.startswith(f"{path} ") and sentence in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no {path}."),
        ("{", "{path} is no JSON ("),
        ("[]", "{path} is no JSON object."),
        ("{}", "{path} describes nothing; known are FluxTransformer2DModel, AutoencoderKL, T5Enc"),
        ('{"_class_name": "UNet2DConditionModel"}', "{path} describes UNet2DConditionModel; known"),
        ('{"model_type": "bert"}', "{path} describes bert; known"),
    ],
)
def test_a_config_that_is_none_is_refused(networks, tmp_path, text, sentence):
    path = save_folder(tmp_path, networks["clip"]) / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert refusal(open_folder, tmp_path).startswith(sentence.format(path=path))


def test_a_config_may_hold_anything_but_is_read_as_it_is(tmp_path):
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
def test_sizes_of_a_bfl_file_are_told_by_its_tensors(name, config, format):
    """At full size: shapes alone, no arrays."""
    assert format.from_shapes(NETWORKS[name].table(config, "bfl").tensors()) == config


def save_bfl(path, config, *without: str):
    """A BFL file of zeros, as others write it, without some tensors."""
    shapes = NETWORKS["transformer"].table(config, "bfl").tensors()
    tensors = {n: np.zeros(s, np.float32) for n, s in shapes.items() if not n.startswith(without)}
    save_file(tensors, path)
    return tensors


ONE_HEAD = FluxConfig.dev(
    in_channels=4, hidden_size=128, num_heads=1, depth=1, depth_single=1, mlp_ratio=0.5,
    vec_in_dim=4, context_in_dim=4,
)  # fmt: skip


def test_a_bfl_file_of_others_is_read(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_bfl(path, ONE_HEAD)
    assert open_file(path).config == ONE_HEAD


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        ("single_blocks.", "has no tensor 'single_blocks.0'."),
        ("vector_in.in_layer.weight", "has no tensor 'vector_in.in_layer.weight'."),
        ("double_blocks.", "holds neither a transformer nor an autoencoder in Black Forest Labs'"),
        ("final_layer.linear.bias", "final_layer.linear.bias is missing."),
    ],
)
def test_a_bfl_file_that_is_incomplete_is_refused(tmp_path, without, sentence):
    path = tmp_path / "flux.safetensors"
    save_bfl(path, ONE_HEAD, without)
    said = refusal(open_file, path)
    assert str(path) in said and sentence in said


def test_fill_s_bfl_file_is_refused(tmp_path):
    path = tmp_path / "fill.safetensors"
    tensors = save_bfl(path, ONE_HEAD)
    save_file(tensors | {"img_in.weight": np.zeros((128, 24), np.float32)}, path)
    assert "final_layer.linear.weight is (4, 128), not (24, 128)" in refusal(open_file, path)


def test_other_heads_than_flux_s_need_a_config(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_bfl(path, CONFIGS["transformer"])
    assert refusal(open_file, path).startswith(
        f"{path} cannot be used: its heads have 8 channels and not 128, and nothing in it says"
    )


def test_other_widths_than_flux_s_need_a_config(networks, tmp_path):
    path = tmp_path / "ae.safetensors"
    save_file(tensors_of(networks["autoencoder"], "bfl"), path)
    assert refusal(open_file, path).startswith(f"{path} cannot be used: channels 8 does not divide")


def test_an_orbax_checkpoint_of_another_network_is_refused(networks, tmp_path):
    reader = reader_of(networks["text_encoder"])
    write_orbax({"text_encoder": reader}, tmp_path, 0, {})
    item, network = tmp_path / "checkpoints" / "0" / "params", reader.network
    other = dataclasses.replace(reader.config, num_layers=3, vocab_size=18)
    said = refusal(OrbaxReader, item, ["text_encoder"], network, other, {})
    assert said.startswith(f"The weights in {item} do not fit this text_encoder: ")
    assert "shared/embedding is (16, 16), not (18, 16)" in said
    assert "blocks/mlp/wo/kernel is (2, 24, 16), not (3, 24, 16)" in said
    missing = refusal(OrbaxReader, item, ["clip"], network, reader.config, {})
    assert missing.count(" is missing") == len(named_leaves(networks["text_encoder"]))
