"""Tests of the name tables: every element is stored once, under PyTorch's names."""

import functools
import math

import numpy as np
import pytest

from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.weights.networks import ALL_NETWORKS
from kontext_jax.weights.table import LAYOUTS, Row, Table, in_layer_order, kernel, linear
from tests.weights.small import CONFIGS

FULL = {
    "dev": ("transformer", FluxConfig.dev()),
    "schnell": ("transformer", FluxConfig.schnell()),
    "autoencoder": ("autoencoder", AutoencoderConfig.flux()),
    "t5": ("text_encoder", T5Config.xxl()),
    "clip": ("clip", ClipConfig.large()),
    "dino": ("dino", DinoConfig.vits14()),
}

COUNTS = {  # parameters, tensors in BFL's layout, in diffusers'
    "dev": (11_901_408_320, 780, 1160),
    "schnell": (11_891_178_560, 776, 1156),
    "autoencoder": (83_819_683, 244, 244),
    "t5": (4_762_310_656, 219, 219),
    "clip": (123_060_480, 196, 196),
    "dino": (22_056_192, 222, 222),  # without the mask token
}

NAMED = {
    ("dev", "bfl"): {
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "time_in.in_layer.weight": (3072, 256),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.out_layer.bias": (3072,),
        "double_blocks.18.img_mod.lin.weight": (18432, 3072),
        "double_blocks.0.txt_attn.qkv.weight": (9216, 3072),
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "double_blocks.3.txt_attn.proj.weight": (3072, 3072),
        "double_blocks.3.img_mlp.0.weight": (12288, 3072),
        "double_blocks.3.txt_mlp.2.weight": (3072, 12288),
        "single_blocks.37.linear1.weight": (21504, 3072),
        "single_blocks.37.linear2.weight": (3072, 15360),
        "single_blocks.0.modulation.lin.weight": (9216, 3072),
        "single_blocks.0.norm.query_norm.scale": (128,),
        "final_layer.linear.weight": (64, 3072),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    },
    ("dev", "diffusers"): {
        "x_embedder.weight": (3072, 64),
        "context_embedder.bias": (3072,),
        "time_text_embed.timestep_embedder.linear_1.weight": (3072, 256),
        "time_text_embed.guidance_embedder.linear_2.weight": (3072, 3072),
        "time_text_embed.text_embedder.linear_1.weight": (3072, 768),
        "transformer_blocks.18.norm1.linear.weight": (18432, 3072),
        "transformer_blocks.0.norm1_context.linear.bias": (18432,),
        "transformer_blocks.0.attn.to_k.weight": (3072, 3072),
        "transformer_blocks.0.attn.add_v_proj.bias": (3072,),
        "transformer_blocks.0.attn.norm_q.weight": (128,),
        "transformer_blocks.0.attn.norm_added_k.weight": (128,),
        "transformer_blocks.0.attn.to_out.0.weight": (3072, 3072),
        "transformer_blocks.0.attn.to_add_out.weight": (3072, 3072),
        "transformer_blocks.0.ff.net.0.proj.weight": (12288, 3072),
        "transformer_blocks.0.ff_context.net.2.weight": (3072, 12288),
        "single_transformer_blocks.37.attn.to_q.weight": (3072, 3072),
        "single_transformer_blocks.37.attn.norm_k.weight": (128,),
        "single_transformer_blocks.37.proj_mlp.weight": (12288, 3072),
        "single_transformer_blocks.37.proj_out.weight": (3072, 15360),
        "single_transformer_blocks.0.norm.linear.weight": (9216, 3072),
        "proj_out.weight": (64, 3072),
        "norm_out.linear.weight": (6144, 3072),
    },
    ("autoencoder", "bfl"): {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
    },
    ("autoencoder", "diffusers"): {
        "encoder.conv_norm_out.weight": (512,),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "decoder.mid_block.attentions.0.group_norm.bias": (512,),
        "decoder.mid_block.resnets.1.norm2.weight": (512,),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
        "decoder.up_blocks.0.resnets.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
    },
    ("t5", "diffusers"): {
        "shared.weight": (32128, 4096),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.23.layer.0.layer_norm.weight": (4096,),
        "encoder.block.23.layer.0.SelfAttention.o.weight": (4096, 4096),
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
        "encoder.block.23.layer.1.DenseReluDense.wo.weight": (4096, 10240),
        "encoder.final_layer_norm.weight": (4096,),
    },
    ("clip", "diffusers"): {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.encoder.layers.11.layer_norm2.bias": (768,),
        "text_model.encoder.layers.0.self_attn.out_proj.weight": (768, 768),
        "text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "text_model.final_layer_norm.weight": (768,),
    },
    ("dino", "diffusers"): {
        "embeddings.cls_token": (1, 1, 384),
        "embeddings.position_embeddings": (1, 1370, 384),
        "embeddings.patch_embeddings.projection.weight": (384, 3, 14, 14),
        "encoder.layer.11.norm2.bias": (384,),
        "encoder.layer.0.attention.attention.query.weight": (384, 384),
        "encoder.layer.0.attention.output.dense.bias": (384,),
        "encoder.layer.0.layer_scale1.lambda1": (384,),
        "encoder.layer.0.mlp.fc1.weight": (1536, 384),
        "layernorm.weight": (384,),
    },
}


@functools.cache
def table_of(kind: str, layout: str) -> Table:
    name, config = FULL[kind]
    return ALL_NETWORKS[name].table(config, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FULL)
def test_every_element_of_every_parameter_is_in_exactly_one_tensor(kind, layout):
    name, config = FULL[kind]
    shapes, pieces = ALL_NETWORKS[name].shapes(config), table_of(kind, layout).pieces
    layers = {param: [] for param in shapes}
    for (param, layer), parts in pieces.items():
        layers[param].append(layer)
        shape = shapes[param] if layer is None else shapes[param][1:]
        edges = [0, *(piece.stop for piece in parts)]
        assert [piece.start for piece in parts] == edges[:-1] and edges[-1] == shape[-1], param
        for piece in parts:
            width = piece.stop - piece.start
            assert width > 0 and sorted(piece.axes) == list(range(len(shape))), piece
            assert math.prod(piece.shape) == math.prod(shape[:-1]) * width, piece
    for param, indices in layers.items():
        stacked = param.startswith(("double_blocks/", "single_blocks/", "blocks/"))
        assert indices == (list(range(shapes[param][0])) if stacked else [None]), param


@pytest.mark.parametrize("kind", FULL)
def test_numbers_of_tensors_and_parameters_match_the_released_weights(kind):
    parameters, *counts = COUNTS[kind]
    for layout, count in zip(LAYOUTS, counts, strict=True):
        names = [p.name for parts in table_of(kind, layout).pieces.values() for p in parts]
        assert len(names) == len(set(names)) == count
        shapes = table_of(kind, layout).tensors().values()
        assert sum(math.prod(shape) for shape in shapes) == parameters


@pytest.mark.parametrize(("kind", "layout"), NAMED, ids="-".join)
def test_names_and_shapes_match_the_released_weights(kind, layout):
    tensors = table_of(kind, layout).tensors()
    assert {name: tensors.get(name) for name in NAMED[kind, layout]} == NAMED[kind, layout]


def test_schnell_is_dev_without_guidance():
    for layout in LAYOUTS:
        dev, schnell = (table_of(kind, layout).tensors() for kind in ("dev", "schnell"))
        assert schnell.items() <= dev.items()
        assert all("guidance" in name for name in dev.keys() - schnell.keys())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_parameters_with_distinct_elements_round_trip_through_tensors(name, layout):
    network, config = ALL_NETWORKS[name], CONFIGS[name]
    shapes = network.shapes(config)
    for (param, layer), pieces in network.table(config, layout).pieces.items():
        shape = shapes[param] if layer is None else shapes[param][1:]
        ours = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        tensors = [piece.to_tensor(ours) for piece in pieces]
        assert [tensor.shape for tensor in tensors] == [piece.shape for piece in pieces]
        assert all(tensor.flags["C_CONTIGUOUS"] for tensor in tensors)
        elements = np.sort(np.concatenate([tensor.ravel() for tensor in tensors]))
        np.testing.assert_array_equal(elements, np.arange(ours.size))
        parts = [piece.to_ours(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=-1), ours)


def pieces_of(row: Row, shape: tuple[int, ...], layout: str):
    (pieces,) = Table([row], {row.param: shape}, layout).pieces.values()
    return pieces


def test_a_kernel_is_transposed():
    (piece,) = pieces_of(*kernel("a", "b"), (2, 3), "bfl")
    np.testing.assert_array_equal(
        piece.to_tensor(np.arange(6).reshape(2, 3)), [[0, 3], [1, 4], [2, 5]]
    )


def test_a_convolution_kernel_is_transposed_from_hwio_to_oihw():
    (piece,) = pieces_of(*kernel("a", "b"), (2, 3, 4, 5), "bfl")
    ours = np.arange(120).reshape(2, 3, 4, 5)
    tensor = piece.to_tensor(ours)
    assert tensor.shape == (5, 4, 2, 3)
    assert tensor[4, 3, 1, 2] == ours[1, 2, 3, 4] and tensor[1, 2, 0, 1] == ours[0, 1, 2, 1]


def test_a_pixelwise_kernel_is_a_1x1_convolution_only_in_bfl_layout():
    row = kernel("a", "b", pixelwise=True)[0]
    ours = np.arange(6).reshape(2, 3)
    for layout, shape in (("bfl", (3, 2, 1, 1)), ("diffusers", (3, 2))):
        (piece,) = pieces_of(row, (2, 3), layout)
        assert piece.shape == shape
        np.testing.assert_array_equal(piece.to_tensor(ours), ours.T.reshape(shape))
        np.testing.assert_array_equal(piece.to_ours(piece.to_tensor(ours)), ours)


def test_halves_are_swapped_only_in_diffusers_layout():
    weight, bias = linear("a", "b", "c", swapped=True)
    ours = np.arange(8).reshape(2, 4)
    for layout, order in (("bfl", [0, 1, 2, 3]), ("diffusers", [2, 3, 0, 1])):
        (piece,) = pieces_of(weight, (2, 4), layout)
        np.testing.assert_array_equal(piece.to_tensor(ours), ours.T[order])
        np.testing.assert_array_equal(piece.to_ours(piece.to_tensor(ours)), ours)
        (piece,) = pieces_of(bias, (4,), layout)
        np.testing.assert_array_equal(piece.to_tensor(np.arange(4)), order)


def test_a_fused_parameter_is_split_by_its_sizes():
    row = linear("a", "b", ("q", "k", "mlp"), sizes=(2, 2, 5))[1]
    pieces = pieces_of(row, (9,), "diffusers")
    assert {piece.name: piece.to_tensor(np.arange(9)).tolist() for piece in pieces} == {
        "q.bias": [0, 1],
        "k.bias": [2, 3],
        "mlp.bias": [4, 5, 6, 7, 8],
    }
    assert [piece.name for piece in pieces_of(row, (9,), "bfl")] == ["b.bias"]


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        (("a",), "b"),  # one is missing
        (("a", "b", "c"), "c"),  # one is unknown
        (("a", "b", "b"), "b"),  # one is duplicate
        (("a", "c"), "b, c"),
    ],
    ids=str,
)
def test_a_table_that_does_not_describe_the_network_is_refused(params, wrong):
    rows = [Row(param, param) for param in params]
    with pytest.raises(ValueError, match=rf"does not describe the network: {wrong}\.$"):
        Table(rows, {"a": (2,), "b": (3,)}, "bfl")


def test_keys_are_ordered_layer_by_layer_after_unstacked_parameters():
    keys = [("blocks/b", 1), ("blocks/a", 1), ("z", None), ("blocks/b", 0), ("blocks/a", 0)]
    assert in_layer_order(keys) == [
        ("z", None),
        ("blocks/a", 0),
        ("blocks/b", 0),
        ("blocks/a", 1),
        ("blocks/b", 1),
    ]
