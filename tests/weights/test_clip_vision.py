"""Tests of a full CLIP from a folder in transformers' layout, and of its embeddings."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.clip_vision import ClipPair, ClipPairConfig, ClipVisionConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.clip_vision import NETWORK, canonical_name, from_json, load_clip
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.reading import ArrayReader

CONFIG = ClipPairConfig(text=ClipConfig.tiny(), vision=ClipVisionConfig.tiny(crop=False))

JSON = {
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "vocab_size": 520,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "eos_token_id": 519,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 512,
    },
}

# Names and shapes in PyTorch's layout, copied from transformers' model.
BLOCK = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.out_proj": (32, 32),
    "layer_norm1": (32,),
    "layer_norm2": (32,),
    "mlp.fc1": (64, 32),
    "mlp.fc2": (32, 64),
}
SHAPES = {
    "text_model.embeddings.token_embedding.weight": (520, 32),
    "text_model.embeddings.position_embedding.weight": (77, 32),
    "text_model.final_layer_norm.weight": (32,),
    "text_model.final_layer_norm.bias": (32,),
    "text_projection.weight": (24, 32),
    "vision_model.embeddings.class_embedding": (32,),
    "vision_model.embeddings.patch_embedding.weight": (32, 3, 8, 8),
    "vision_model.embeddings.position_embedding.weight": (5, 32),
    "vision_model.pre_layrnorm.weight": (32,),
    "vision_model.pre_layrnorm.bias": (32,),
    "vision_model.post_layernorm.weight": (32,),
    "vision_model.post_layernorm.bias": (32,),
    "visual_projection.weight": (24, 32),
} | {
    f"{tower}_model.encoder.layers.{i}.{name}.{kind}": shape if kind == "weight" else shape[:1]
    for tower in ("text", "vision")
    for i in range(2)
    for name, shape in BLOCK.items()
    for kind in ("weight", "bias")
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def pair(random_network):
    return random_network(lambda: ClipPair(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def tensors(pair):
    reader = ArrayReader(NETWORK, pair)
    return {
        piece.name: piece.to_tensor(reader.read(key))
        for key, pieces in NETWORK.table(CONFIG, "diffusers").pieces.items()
        for piece in pieces
    }


@pytest.fixture(scope="module")
def tokenizer_folder(flux_tokenizers):
    return flux_tokenizers / "tokenizer"


@pytest.fixture
def folder(tmp_path, tensors, tokenizer_folder):
    """A folder that includes the tensors of training only and of old files."""
    more = {"logit_scale": np.zeros((), np.float32)}
    for tower, number in (("text", 77), ("vision", 5)):
        more[f"{tower}_model.embeddings.position_ids"] = np.arange(number)[None]
    return save(tmp_path / "clip", tensors | more, tokenizer_folder)


def save(folder, tensors, tokenizer_folder, values=JSON):
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_table_matches_transformers_names_and_shapes(tensors):
    assert {name: x.shape for name, x in tensors.items()} == SHAPES


def test_parameters_are_read_bit_for_bit(folder, pair, mesh):
    loaded = load_clip(folder, mesh, crop=False).network
    actual, expected = named_leaves(loaded), named_leaves(pair)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    assert loaded.config.text.dtype == loaded.config.vision.dtype == "float32"
    assert loaded.config.vision.projection_dim == 24


def test_embeddings_are_in_order_for_any_batch_size(folder, pair, mesh, tokenizer_folder):
    """On eight devices, which divide neither batches of three nor 19 prompts."""
    clip, rng = load_clip(folder, mesh, crop=False), np.random.default_rng(0)
    words = ["make", "it", "red", "a", "zebra"]
    prompts = [" ".join(rng.choice(words, n)) for n in [1, 2, 3, 4, 100] * 3 + [0] * 4]
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in [(16, 16), (20, 12)] * 4]
    of_prompts, of_images = clip.text(prompts, mesh, 3), clip.image(images, mesh, 3)
    assert of_prompts.shape == (19, 24) and of_images.shape == (8, 24)
    assert of_prompts.dtype == of_images.dtype == np.float32
    tokenizer = Tokenizer(TextConfig(clip_tokenizer=str(tokenizer_folder)))
    ids = np.stack([tokenizer.clip(prompt) for prompt in prompts])
    assert ids.shape == (19, 77) and (ids[4] != 519).sum() == 76  # truncated
    np.testing.assert_allclose(
        of_prompts, jax.jit(lambda p, x: p.encode_text(x))(pair, ids), atol=2e-5
    )
    alone = jax.jit(lambda pair, image: pair.vision(to_pixels(image[None])).pooled[0])
    for image, vector in zip(images, of_images, strict=True):
        np.testing.assert_allclose(vector, alone(pair, image), atol=2e-5)


def test_empty_inputs_are_refused(folder, mesh):
    clip = load_clip(folder, mesh)
    assert clip.network.config.vision.crop
    with pytest.raises(ValueError, match="There are no prompts"):
        clip.text([], mesh)
    with pytest.raises(ValueError, match="There are no images"):
        clip.image([], mesh)


def test_one_message_names_everything_that_does_not_fit(tmp_path, tensors, tokenizer_folder, mesh):
    wrong = {name: x for name, x in tensors.items() if name != "text_projection.weight"}
    wrong["vision_model.embeddings.position_embedding.weight"] = np.zeros((50, 32), np.float32)
    wrong["vision_model.extra"] = np.zeros(1, np.float32)
    folder = save(tmp_path / "clip", wrong, tokenizer_folder)
    with pytest.raises(WeightsError) as error:
        load_clip(folder, mesh)
    for part in (
        f"weights in {folder} do not fit this CLIP: ",
        "vision_model.extra is unexpected",
        "text_projection.weight is missing",
        "vision_model.embeddings.position_embedding.weight is (50, 32), not (5, 32)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_text_model"}, "describes clip_text_model, not a full CLIP"),
        ({"vision_config": {"hidden_act": "gelu"}}, "CLIP does not support hidden_act = gelu"),
        ({"vision_config": {"patch_size": 60}}, "image_size 224 must be a multiple of patch_size"),
        ({"vision_config": {"hidden_size": "x"}}, "config.json cannot be used"),
        ({"text_config": {"hidden_act": "gelu"}}, "it has hidden_act gelu"),
        (
            {"text_config": JSON["text_config"] | {"eos_token_id": 3}},
            "it does not end prompts with the end id 3",
        ),
    ],
    ids=str,
)
def test_other_networks_are_refused(tmp_path, tensors, tokenizer_folder, mesh, change, message):
    folder = save(tmp_path / "clip", tensors, tokenizer_folder, JSON | change)
    with pytest.raises(WeightsError, match=message):
        load_clip(folder, mesh)


def test_missing_settings_are_those_of_vit_b32():
    """151,277,313 parameters in total, including logit_scale."""
    for values in ({}, {"text_config": {"eos_token_id": 2}, "vision_config_dict": None}):
        config = from_json(values)
        assert config.vision == ClipVisionConfig.vit_b32()
        sizes = dict(hidden_size=512, intermediate_size=2048, num_heads=8)
        assert config.text == ClipConfig(**sizes)
        shapes = NETWORK.shapes(config)
        assert sum(map(math.prod, shapes.values())) + 1 == 151_277_313
    old = {"vision_config": {"hidden_size": 768}, "vision_config_dict": {"hidden_size": 1536}}
    assert from_json(old).vision.hidden_size == 1536


def test_unused_tensors_are_skipped():
    assert canonical_name("logit_scale") is None
    assert canonical_name("text_model.embeddings.position_ids") is None
    assert canonical_name("text_projection.weight") == "text_projection.weight"
