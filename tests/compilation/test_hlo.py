"""HLO cost analysis against programs of known cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kontext_jax.compilation import hlo
from kontext_jax.compilation.hlo import analyse
from kontext_jax.sharding import MeshConfig, make_mesh


def cost_of(function, *shapes, **kwargs):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return analyse(jax.jit(function, **kwargs).lower(*arguments).compile().as_text())


def test_cost_of_a_matrix_product():
    cost = cost_of(lambda x, y: x @ y, (16, 32), (32, 8))
    assert cost.flops == 2 * 16 * 32 * 8
    assert cost.bytes == 4 * (16 * 32 + 32 * 8 + 16 * 8)
    assert not cost.collectives and not cost.opaque and not cost.unknown_loops


def test_flops_of_a_batched_matrix_product():
    cost = cost_of(lambda x, y: jnp.einsum("bhqk,bhsk->bhqs", x, y), (3, 2, 8, 4), (3, 2, 16, 4))
    assert cost.flops == 2 * 3 * 2 * 8 * 16 * 4


def test_a_loop_body_counts_once_per_iteration():
    def function(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    cost = cost_of(function, (8, 16), (7, 16, 16))
    assert cost.flops == 7 * 2 * 8 * 16 * 16
    # An iteration reads only its slice of the stacked weights, not all of them.
    assert cost.bytes < 7 * 4 * 7 * 16 * 16


def test_nested_loops_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(2, 7, lambda _, x: jnp.sin(x @ w), x), None

    cost = cost_of(lambda x, ws: jax.lax.scan(inner, x, ws)[0], (8, 16), (3, 16, 16))
    assert cost.flops == 3 * 5 * 2 * 8 * 16 * 16
    assert not cost.unknown_loops


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    def function(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: x @ w, x)

    cost = cost_of(function, (8, 16), (16, 16))
    assert cost.flops == 2 * 8 * 16 * 16
    assert cost.unknown_loops == 1


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (dict(window_strides=(1,), padding=((0, 0),)), 8 * 3),
        (dict(window_strides=(2,), padding=((0, 0),)), 4 * 3),
        (dict(window_strides=(1,), padding=((1, 1),)), 10 * 3 - 2),
        # Ten inputs and nine holes between them: 17 window positions, each covering 1 or 2 inputs.
        (dict(window_strides=(1,), padding=((0, 0),), lhs_dilation=(2,)), 26),
    ],
)
def test_padding_and_holes_of_a_convolution_count_as_no_work(config, positions):
    def function(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **config
        )

    assert cost_of(function, (2, 10, 4), (3, 4, 6)).flops == 2 * 2 * 4 * 6 * positions


MESH = MeshConfig(data=2, fsdp=4)


@pytest.mark.parametrize(
    ("start", "end", "kind", "sent"),
    [
        (P(("data", "fsdp")), P(), "all-gather", 4 * 16 * 8 / 8 * 7),
        (P("fsdp"), P(), "all-gather", 4 * 16 * 8 / 4 * 3),
        (P("fsdp"), P(None, "fsdp"), "all-to-all", 4 * 16 * 8 / 4 * 3 / 4),
    ],
)
def test_bytes_sent_by_collectives(start, end, kind, sent):
    mesh = make_mesh(MESH)
    cost = cost_of(
        lambda x: x,
        (16, 8),
        in_shardings=NamedSharding(mesh, start),
        out_shardings=NamedSharding(mesh, end),
    )
    assert cost.collectives == {kind: (1, sent)}


def test_collectives_in_a_loop_count_once_per_iteration():
    mesh = make_mesh(MESH)

    def function(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    cost = cost_of(
        function,
        (8, 16),
        (5, 16, 16),
        in_shardings=(NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P(None, "fsdp"))),
        out_shardings=NamedSharding(mesh, P(None, "fsdp")),
    )
    assert cost.flops == 5 * 2 * 8 * 16 * 16 / 4
    assert sum(sent.count for sent in cost.collectives.values()) >= 5


TPU = """HloModule step, is_scheduled=true, num_partitions=8

%inside (p.1: bf16[64,16], p.2: bf16[8,64]) -> (bf16[8,16]) {
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p.1 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[512,16]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
  %convolution.1 = bf16[8,16]{1,0} convolution(%p.2, %p.1), dim_labels=bf_io->bf
  ROOT %tuple.1 = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%convolution.1)
}

%start (p.3: bf16[64,16]) -> (bf16[64,16], u32[]) {
  %p.3 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[512,16]{1,0} all-gather(%p.3), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[64,16]{1,0}, /*index=1*/u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%scatter (p.4: f32[32]) -> f32[8] {
  %p.4 = f32[32]{0} parameter(0)
  %constant.3 = s32[] constant(0)
  %all-reduce.1 = f32[32]{0} all-reduce(%p.4), channel_id=9, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%sum
  ROOT %dynamic-slice.1 = f32[8]{0} dynamic-slice(%all-reduce.1, %constant.3), dynamic_slice_sizes={8}
}

%body (p.5: (s32[], bf16[64,16], bf16[8,64])) -> (s32[], bf16[64,16], bf16[8,64]) {
  %p.5 = (s32[]{:T(128)}, bf16[64,16]{1,0}, bf16[8,64]{1,0:S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.5), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %w = bf16[64,16]{1,0} get-tuple-element(%p.5), index=1
  %x = bf16[8,64]{1,0:S(1)} get-tuple-element(%p.5), index=2
  %fusion.1 = (bf16[8,16]{1,0:S(1)}) fusion(%w, %x), kind=kOutput, calls=%inside
  ROOT %tuple.2 = (s32[], bf16[64,16]{1,0}, bf16[8,64]{1,0:S(1)}) tuple(%next, %w, %x)
}

%condition (p.6: (s32[], bf16[64,16], bf16[8,64])) -> pred[] {
  %p.6 = (s32[]{:T(128)}, bf16[64,16]{1,0}, bf16[8,64]{1,0:S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  %bound = s32[]{:T(128)} constant(8)
  ROOT %test = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

ENTRY %main (p.7: bf16[64,16], p.8: bf16[8,64], p.9: f32[32]) -> f32[8] {
  %p.7 = bf16[64,16]{1,0} parameter(0)
  %p.8 = bf16[8,64]{1,0:S(1)} parameter(1)
  %p.9 = f32[32]{0} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %fusion.2 = (bf16[64,16]{1,0}, u32[]{:S(2)}) fusion(%p.7), kind=kCustom, calls=%start
  %state = (s32[], bf16[64,16]{1,0}, bf16[8,64]{1,0:S(1)}) tuple(%copied, %p.7, %p.8)
  %loop = (s32[], bf16[64,16]{1,0}, bf16[8,64]{1,0:S(1)}) while(%state), condition=%condition, body=%body
  %kernel = f32[8]{0} custom-call(%p.9), custom_call_target="tpu_custom_call"
  ROOT %fusion.3 = f32[8]{0} fusion(%p.9), kind=kCustom, calls=%scatter
}
"""  # noqa: E501


def test_programs_of_the_tpu_compiler():
    """No known trip counts, collectives spread over fusions, matrix products as convolutions."""
    cost = analyse(TPU)
    assert cost.unknown_loops == 0
    assert cost.flops == 4 * 2 * 8 * 64 * 16  # i = 0, 2, 4, 6
    assert cost.collectives == {
        "all-gather": (1, 2 * 64 * 16 * 7),
        "reduce-scatter": (1, 4 * 32 * 3 / 4),
    }
    assert cost.opaque == {"tpu_custom_call": 1}


def test_known_kernels_count_by_name_prefix_and_operand_shapes():
    cost = analyse(TPU, {"ker": lambda shapes: 1000 * shapes[0][0]})
    assert cost.flops == analyse(TPU).flops + 1000 * 32
    assert not cost.opaque


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=16] {'a':(2)4}", 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("{}", 16),
    ],
)
def test_every_notation_of_replica_groups(groups, size):
    text = f"%x = f32[8]{{0}} all-reduce(%y), replica_groups={groups}, to_apply=%sum"
    name, rest = text.split(" = ")
    assert hlo._group_size(hlo._parse(name[1:], rest), num_devices=16) == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[4,2]{1,0}", 32),
        ("pred[3]", 3),
        ("(bf16[8]{0:T(8,128)(2,1)}, s32[], u32[]{:S(2)})", 24),
        ("f8e4m3fn[5]", 5),
        ("s4[8]", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo._num_bytes(shape) == size
    in_main = size - 4 if "S(2)" in shape else size
    assert hlo._num_bytes(shape, in_main_memory=True) == in_main


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        analyse("nothing")


def test_valid_window_positions_agree_with_counting():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size, kernel, out, stride, padding, lhs, rhs = rng.integers(1, 6, 7).tolist()
        inputs = np.zeros(1000, int)
        inputs[500 : 500 + size * lhs : lhs] = 1
        expected = sum(
            inputs[500 + o * stride - padding + k * rhs] for o in range(out) for k in range(kernel)
        )
        counted = hlo._valid_positions(
            size, kernel, out, stride=stride, padding=padding, lhs_dilation=lhs, rhs_dilation=rhs
        )
        assert counted == expected
