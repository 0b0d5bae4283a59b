"""Tests of adapters in diffusers' layout: exact round trips, and the same function as in a file."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kontext_jax.models import lora
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights import lora as lora_files
from kontext_jax.weights.export import write_diffusers
from kontext_jax.weights.files import NewTensor, TensorFiles, WeightsError
from kontext_jax.weights.lora import FILE_NAME, MergedReader, read_lora, write_lora
from kontext_jax.weights.networks import NETWORKS, architecture
from kontext_jax.weights.reading import ArrayReader, open_folder

CONFIG = FluxConfig.tiny(
    in_channels=8, hidden_size=16, num_heads=2, depth=2, depth_single=3, vec_in_dim=8,
    context_in_dim=12, axes_dim=(2, 2, 4), guidance_embed=True,
)  # fmt: skip
D = CONFIG.hidden_size
ALL = LoraConfig(rank=3, alpha=2.0, targets=("*",))
QKV = "double_blocks/img_attn/qkv"
TO_Q, TO_K, TO_V = (f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv")


def random_adapters(config=ALL, seed=0):
    """Returns adapters with a nonzero ``b``, as after training."""
    rng = np.random.default_rng(seed)
    network = NETWORKS["transformer"].abstract(CONFIG)
    adapters = jax.eval_shape(lambda: lora.init(network, config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), adapters)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (
            x.dtype == y.dtype == jnp.float32 and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        )


def fields_of(file):
    """Returns the fields that diffusers passes to peft's ``LoraConfig``."""
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    fields = json.loads(metadata["lora_adapter_metadata"])
    assert all(name.startswith("transformer.") for name in fields)
    return {name.removeprefix("transformer."): value for name, value in fields.items()}


def save(folder, tensors, **fields):
    """Writes a file in diffusers' layout; without fields, the file has no alpha."""
    metadata = {"format": "pt"}
    if fields:
        metadata["lora_adapter_metadata"] = json.dumps(
            {f"transformer.{name}": value for name, value in fields.items()}, sort_keys=True
        )
    save_file(tensors, folder / FILE_NAME, metadata)
    return folder


def pair(module, rank, in_features=D, out_features=D, seed=0, dtype=np.float32):
    """Returns A and B of one module, as stored in a file."""
    rng = np.random.default_rng([seed, *module.encode()])
    return {
        f"transformer.{module}.lora_A.weight": rng.standard_normal((rank, in_features)).astype(
            dtype
        ),
        f"transformer.{module}.lora_B.weight": rng.standard_normal((out_features, rank)).astype(
            dtype
        ),
    }


def product(tensors, module):
    """Returns the product B A in float64, transposed to our kernels' (in, out)."""
    a, b = (
        tensors[f"transformer.{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB"
    )
    return (b @ a).T


def delta(adapter):
    """Returns the change of an adapter to its kernel, in float64."""
    a, b = (np.asarray(x[...], np.float64) for x in (adapter.a, adapter.b))
    return adapter.scale * (a @ b)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 2.0, 8.0, 0.7])
def test_adapters_round_trip_bit_for_bit(tmp_path, alpha):
    adapters = random_adapters(LoraConfig(rank=3, alpha=alpha, targets=("*",)))
    write_lora(adapters, CONFIG, tmp_path, {})
    assert_same(read_lora(tmp_path, CONFIG), adapters)
    assert_same(read_lora(tmp_path / FILE_NAME, CONFIG), adapters)
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_newly_initialised_adapters_round_trip(tmp_path):
    network = NETWORKS["transformer"].abstract(CONFIG)
    adapters = lora.init(network, LoraConfig(rank=2), jax.random.key(0))
    write_lora(adapters, CONFIG, tmp_path / "new" / "style.safetensors", {})
    assert_same(read_lora(tmp_path / "new" / "style.safetensors", CONFIG), adapters)
    assert_same(read_lora(tmp_path / "new", CONFIG), adapters)


def test_mixed_ranks_and_alphas_round_trip(tmp_path):
    kinds = {"double_blocks/*": (4, 3.0), "single_blocks/linear1": (4, 0.1), "*_in*": (2, 3.0)}
    adapters = {}
    for target, (rank, alpha) in kinds.items():
        adapters |= random_adapters(LoraConfig(rank=rank, alpha=alpha, targets=(target,)))
    write_lora(adapters, CONFIG, tmp_path, {})
    assert_same(read_lora(tmp_path, CONFIG), adapters)
    fields = fields_of(tmp_path / FILE_NAME)
    assert (fields["r"], fields["lora_alpha"]) == (4, 3)
    assert fields["rank_pattern"]["^x_embedder"] == 2 and len(fields["rank_pattern"]) == 8
    singles = [f"^single_transformer_blocks.{i}.attn.to_q" for i in range(3)]
    assert {fields["alpha_pattern"][name] for name in singles} == {0.1}
    assert len(fields["alpha_pattern"]) == 3 * 4


def test_names_and_metadata_match_diffusers(tmp_path):
    write_lora(random_adapters(LoraConfig(rank=2, alpha=3.0)), CONFIG, tmp_path, {"step": 7})
    double = ["attn." + name for name in ("to_q", "to_k", "to_v", "to_out.0")]
    double += ["attn." + name for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
    double += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    modules = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in double]
    modules += [f"single_transformer_blocks.{i}.{name}" for i in range(3) for name in single]
    tensors = load_file(tmp_path / FILE_NAME)
    assert set(tensors) == {
        f"transformer.{module}.lora_{letter}.weight" for module in modules for letter in "AB"
    }
    first = "transformer.transformer_blocks.0"
    assert tensors[f"{first}.attn.to_q.lora_A.weight"].shape == (2, D)
    assert tensors[f"{first}.ff.net.2.lora_A.weight"].shape == (2, 4 * D)
    assert tensors[f"{first}.ff.net.0.proj.lora_B.weight"].shape == (4 * D, 2)
    assert fields_of(tmp_path / FILE_NAME) == {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(modules),
    }
    record = TensorFiles(tmp_path).record
    network = json.loads(json.dumps(architecture(CONFIG)))
    assert record == {"step": 7, "network": network}


def test_targets_that_match_other_modules_are_a_regular_expression(tmp_path):
    """As a name, peft would match ``proj_out`` in every single block too."""
    write_lora(
        random_adapters(LoraConfig(rank=1, targets=("final_layer/*",))), CONFIG, tmp_path, {}
    )
    assert fields_of(tmp_path / FILE_NAME)["target_modules"] == r"norm_out\.linear|proj_out"


def test_a_file_changes_every_kernel_as_the_adapters_do(tmp_path):
    """For all modules of diffusers, by the name table of the transformer."""
    adapters = random_adapters()
    write_lora(adapters, CONFIG, tmp_path, {})
    tensors, fields = load_file(tmp_path / FILE_NAME), fields_of(tmp_path / FILE_NAME)
    scale = fields["lora_alpha"] / fields["r"]
    count = 0
    for (param, layer), pieces in NETWORKS["transformer"].table(CONFIG, "diffusers").pieces.items():
        if not param.endswith("/kernel"):
            continue
        ours = delta(adapters[param.removesuffix("/kernel")])
        for piece in pieces:
            expected = piece.to_tensor(ours if layer is None else ours[layer])
            actual = scale * product(tensors, piece.name.removesuffix(".weight")).T
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
            count += 1
    assert 2 * count == len(tensors)


def test_halves_of_the_final_modulation_are_swapped(tmp_path):
    path = "final_layer/adaLN_modulation"
    adapters = random_adapters(LoraConfig(rank=2, targets=(path,)))
    write_lora(adapters, CONFIG, tmp_path, {})
    b = load_file(tmp_path / FILE_NAME)["transformer.norm_out.linear.lora_B.weight"]
    ours = np.asarray(adapters[path].b[...]).T
    np.testing.assert_array_equal(b, np.concatenate([ours[D:], ours[:D]]))


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 10, 49, 64, 128])
def test_alpha_divided_by_rank_is_exactly_the_scale(rank):
    rng = np.random.default_rng(rank)
    for alpha in [*range(1, 200), *rng.uniform(0, 100, 200).tolist()]:
        scale = alpha / rank
        assert lora_files._alpha(scale, rank) / rank == scale
    assert repr(lora_files._alpha(1 / rank, rank)) == "1"


def test_modules_with_equal_a_share_ranks(tmp_path):
    tensors = {}
    for i in range(2):
        for part in (TO_Q, TO_K, TO_V):
            tensors |= pair(part.format(i), 2)
            a = f"transformer.{part.format(i)}.lora_A.weight"
            tensors[a] = tensors[f"transformer.{TO_Q.format(i)}.lora_A.weight"]
    adapters = read_lora(save(tmp_path, tensors), CONFIG)
    assert list(adapters) == [QKV]
    assert adapters[QKV].a.shape == (2, D, 2) and adapters[QKV].b.shape == (2, 2, 3 * D)
    for i in range(2):
        parts = [product(tensors, part.format(i)) for part in (TO_Q, TO_K, TO_V)]
        assert_close(delta(adapters[QKV])[i], np.concatenate(parts, axis=1))


def test_modules_with_different_a_get_separate_ranks(tmp_path):
    tensors = {}
    for i in range(2):
        for rank, part in enumerate((TO_Q, TO_K, TO_V), start=2):
            tensors |= pair(part.format(i), rank)
    ranks = {"r": 2, "rank_pattern": {"to_k": 3, "attn.to_v": 4}}
    alphas = {"lora_alpha": 1, "alpha_pattern": {"to_k": 1.5, "to_v": 2}}
    folder = save(tmp_path, tensors, **ranks, **alphas)
    adapter = read_lora(folder, CONFIG)[QKV]
    assert adapter.a.shape == (2, D, 9) and adapter.scale == 0.5
    a = np.concatenate([tensors[f"transformer.{p.format(1)}.lora_A.weight"] for p in (TO_Q, TO_K)])
    assert np.asarray(adapter.a[1, :, :5]).T.tobytes() == a.tobytes()
    for i in range(2):
        parts = [product(tensors, part.format(i)) for part in (TO_Q, TO_K, TO_V)]
        assert_close(delta(adapter)[i], 0.5 * np.concatenate(parts, axis=1))
    write_lora({QKV: adapter}, CONFIG, tmp_path / "again", {})
    assert_same(read_lora(tmp_path / "again", CONFIG), {QKV: adapter})


def test_modules_and_layers_without_an_adapter_do_not_change(tmp_path):
    """Queries and values in one layer; the MLP of one single block; a layer of higher rank."""
    mlp = "single_transformer_blocks.1.proj_mlp"
    tensors = pair(TO_Q.format(0), 2) | pair(TO_V.format(0), 2) | pair(TO_V.format(1), 5)
    tensors |= pair(mlp, 2, out_features=4 * D)
    adapters = read_lora(save(tmp_path, tensors), CONFIG)
    assert list(adapters) == [QKV, "single_blocks/linear1"]
    qkv, linear1 = delta(adapters[QKV]), delta(adapters["single_blocks/linear1"])
    assert adapters[QKV].a.shape == (2, D, 5)
    zeros = np.zeros((D, D))
    expected = [product(tensors, TO_Q.format(0)), zeros, product(tensors, TO_V.format(0))]
    assert_close(qkv[0], np.concatenate(expected, axis=1))
    expected = [zeros, zeros, product(tensors, TO_V.format(1))]
    assert_close(qkv[1], np.concatenate(expected, axis=1))
    assert_close(linear1[1, :, 3 * D :], product(tensors, mlp))
    assert not np.any(linear1[[0, 2]]) and not np.any(linear1[1, :, : 3 * D])


def test_different_scales_are_folded_into_b(tmp_path):
    tensors = pair(TO_Q.format(0), 2) | pair(TO_K.format(0), 2) | pair(TO_K.format(1), 2)
    tensors |= pair("x_embedder", 2, in_features=8)
    alphas = {"^transformer_blocks.0.attn.to_k": 3.0, "x_embedder": 5.0}
    folder = save(tmp_path, tensors, r=2, lora_alpha=1, alpha_pattern=alphas)
    adapters = read_lora(folder, CONFIG)
    assert adapters[QKV].scale == 1.0 and adapters["img_in"].scale == 2.5
    qkv = delta(adapters[QKV])
    assert_close(qkv[0, :, :D], 0.5 * product(tensors, TO_Q.format(0)))
    assert_close(qkv[0, :, D : 2 * D], 1.5 * product(tensors, TO_K.format(0)))
    assert_close(qkv[1, :, D : 2 * D], 0.5 * product(tensors, TO_K.format(1)))
    assert_close(delta(adapters["img_in"]), 2.5 * product(tensors, "x_embedder"))


def test_patterns_match_from_the_start_of_a_name_or_after_a_dot(tmp_path):
    """As in peft, ``^proj_out`` is only the last module, ``proj_out`` the single blocks' too."""
    single = "single_transformer_blocks.0.proj_out"
    tensors = pair("proj_out", 2, out_features=8) | pair(single, 2, in_features=5 * D)
    for pattern, expected in (("^proj_out", 1.0), ("proj_out", 4.0), ("oj_out", 1.0)):
        folder = save(tmp_path, tensors, r=2, lora_alpha=2, alpha_pattern={pattern: 8})
        adapters = read_lora(folder, CONFIG)
        assert adapters["single_blocks/linear2"].scale == expected
        assert adapters["final_layer/linear"].scale == (1.0 if pattern == "oj_out" else 4.0)


def test_alpha_may_be_a_tensor_or_missing(tmp_path):
    tensors = pair("x_embedder", 2, in_features=8)
    assert read_lora(save(tmp_path, tensors), CONFIG)["img_in"].scale == 1.0
    tensors["transformer.x_embedder.alpha"] = np.asarray(3.0, np.float32)
    assert read_lora(save(tmp_path, tensors), CONFIG)["img_in"].scale == 1.5


def test_rank_stabilised_scales_are_read(tmp_path):
    tensors = pair("x_embedder", 2, in_features=8)
    folder = save(tmp_path, tensors, r=2, lora_alpha=3, use_rslora=True)
    assert read_lora(folder, CONFIG)["img_in"].scale == 3 / math.sqrt(2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    tensors = pair("context_embedder", 3, in_features=12, dtype=dtype)
    adapter = read_lora(save(tmp_path, tensors), CONFIG)["txt_in"]
    assert adapter.a.dtype == adapter.b.dtype == np.float32
    a = tensors["transformer.context_embedder.lora_A.weight"]
    np.testing.assert_array_equal(np.asarray(adapter.a[...]).T, a.astype(np.float32))


def test_a_file_without_prefix_is_read(tmp_path):
    """The format of ``FluxTransformer2DModel.save_lora_adapter``."""
    tensors = pair("x_embedder", 2, in_features=8)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    fields = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})}
    save_file(bare, tmp_path / FILE_NAME, fields)
    adapters = read_lora(tmp_path, CONFIG)
    assert_close(delta(adapters["img_in"]), 4.0 * product(tensors, "x_embedder"))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "kohya's"),
        ("transformer.x_embedder.lora_down.weight", "kohya's"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs'"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "Black Forest Labs'"),
        ("diffusion_model.single_blocks.0.linear1.lora_A.weight", "Black Forest Labs'"),
        ("base_model.model.x_embedder.lora_A.weight", "PEFT's own"),
        ("transformer.x_embedder.lokr_w1", "LyCORIS'"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, name, layout):
    save(tmp_path, {name: np.zeros((2, 8), np.float32)})
    with pytest.raises(
        WeightsError, match=rf"adapters in {layout}.* layout \({name}\), not in diffusers'"
    ):
        read_lora(tmp_path, CONFIG)


def test_a_file_without_adapters_is_refused(tmp_path):
    save(tmp_path, {"x_embedder.weight": np.zeros((16, 8), np.float32)})
    with pytest.raises(
        WeightsError, match=r"no adapters in diffusers' layout: no \*\.lora_A\.weight"
    ):
        read_lora(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError):
        read_lora(tmp_path / "nowhere", CONFIG)


def test_one_message_names_everything_that_does_not_fit(tmp_path):
    tensors = pair("x_embedder", 2, in_features=9) | pair(TO_Q.format(7), 2)
    tensors |= pair(TO_K.format(0), 2) | pair(TO_Q.format(0), 2, dtype=np.float64)
    tensors |= pair("text_encoder.q_proj", 2) | pair("proj_out", 0, out_features=8)
    tensors["transformer.context_embedder.lora_A.weight"] = np.zeros((2, 12), np.float32)
    tensors["transformer.norm_out.linear.alpha"] = np.zeros((), np.float32)
    tensors["transformer.x_embedder.lora_magnitude_vector"] = np.zeros((16,), np.float32)
    del tensors[f"transformer.{TO_K.format(0)}.lora_A.weight"]
    folder = save(tmp_path, tensors)
    with pytest.raises(WeightsError) as error:
        read_lora(folder, CONFIG)
    start, _, wrong = str(error.value).removesuffix(".").partition(" do not fit: ")
    assert start == f"The adapters in {tmp_path / FILE_NAME}"
    unknown = "belongs to no linear map of this transformer"
    assert sorted(wrong.split("; ")) == sorted(
        [
            "x_embedder has A (2, 9) and B (16, 2), which do not fit its kernel (16, 8)",
            f"transformer.transformer_blocks.7.attn.to_q.lora_A.weight {unknown}",
            f"transformer.transformer_blocks.7.attn.to_q.lora_B.weight {unknown}",
            f"transformer.text_encoder.q_proj.lora_A.weight {unknown}",
            f"transformer.text_encoder.q_proj.lora_B.weight {unknown}",
            f"transformer.x_embedder.lora_magnitude_vector {unknown}",
            "transformer_blocks.0.attn.to_k has lora_B.weight but no lora_A.weight",
            "transformer_blocks.0.attn.to_q is F64, not F32, BF16, F16",
            "context_embedder has lora_A.weight but no lora_B.weight",
            "norm_out.linear has alpha but no lora_A.weight or lora_B.weight",
            "proj_out has A (0, 16) and B (8, 0), which do not fit its kernel (8, 16)",
        ]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, "x_embedder has rank 2, but 4 in the metadata"),
        ({"r": 2, "lora_alpha": None}, "x_embedder has alpha None in the metadata"),
        ({"lora_alpha": 2}, "x_embedder has rank 2, but 8 in the metadata"),  # peft's default
        (
            {"r": 2, "init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4' changes the base model's kernels too",
        ),
    ],
)
def test_invalid_or_unsupported_metadata_is_refused(tmp_path, fields, message):
    folder = save(tmp_path, pair("x_embedder", 2, in_features=8), **fields)
    with pytest.raises(WeightsError, match=message):
        read_lora(folder, CONFIG)


def test_metadata_must_be_a_json_object(tmp_path):
    for text in ("{", "[1]", "3"):
        metadata = {"lora_adapter_metadata": text}
        save_file(pair("x_embedder", 2, in_features=8), tmp_path / FILE_NAME, metadata)
        with pytest.raises(WeightsError, match="metadata of .* is not a JSON object"):
            read_lora(tmp_path, CONFIG)


def test_ambiguous_alphas_are_refused(tmp_path):
    tensors = pair("x_embedder", 2, in_features=8) | pair("context_embedder", 2, in_features=12)
    tensors["transformer.x_embedder.alpha"] = np.zeros((2,), np.float32)
    with pytest.raises(WeightsError) as error:
        read_lora(save(tmp_path, tensors), CONFIG)
    assert (
        "context_embedder has no alpha, unlike other modules; the alpha of x_embedder is not a "
        "scalar."
    ) in str(error.value)
    with pytest.raises(
        WeightsError, match=r"alpha is in both the metadata and tensors \(x_embedder\)"
    ):
        read_lora(save(tmp_path, tensors, r=2, lora_alpha=2), CONFIG)


def test_no_adapters_or_adapters_of_another_network_are_not_written(tmp_path):
    adapters = random_adapters(LoraConfig(rank=2, targets=(QKV,)))
    with pytest.raises(ValueError, match="no adapters to write"):
        write_lora({}, CONFIG, tmp_path, {})
    with pytest.raises(ValueError, match="no linear map 'qkv'; choose from"):
        write_lora({"qkv": adapters[QKV]}, CONFIG, tmp_path, {})
    with pytest.raises(ValueError, match="does not fit its kernel"):
        write_lora({"img_in": adapters[QKV]}, CONFIG, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_corrupt_write_keeps_the_existing_file(tmp_path, monkeypatch):
    first, second = random_adapters(seed=0), random_adapters(seed=1)
    write_lora(first, CONFIG, tmp_path, {})
    write_file = lora_files.write_file

    def flip(path, tensors, metadata):
        i = next(i for i, tensor in enumerate(tensors) if "to_out.0.lora_B" in tensor.name)
        flipped = tensors[i]._replace(make=lambda: -tensors[i].make())
        write_file(path, [*tensors[:i], NewTensor(*flipped), *tensors[i + 1 :]], metadata)

    monkeypatch.setattr(lora_files, "write_file", flip)
    message = "adapters differ from their source in double_blocks/img_attn/proj; check the disk"
    with pytest.raises(WeightsError, match=message):
        write_lora(second, CONFIG, tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]
    assert_same(read_lora(tmp_path, CONFIG), first)


@pytest.fixture(scope="module")
def network(random_network):
    return random_network(lambda: Flux(CONFIG, rngs=nnx.Rngs(0)))


def test_a_merged_reader_returns_the_merged_network(network, tmp_path):
    adapters = random_adapters()
    write_lora(adapters, CONFIG, tmp_path / "lora", {})
    source = ArrayReader(NETWORKS["transformer"], network, {"from": "here"})
    reader = MergedReader(source, read_lora(tmp_path / "lora", CONFIG))
    assert reader.record == {"from": "here"} and reader.dtypes == source.dtypes
    write_diffusers(reader, tmp_path / "merged", {})
    merged = open_folder(tmp_path / "merged")
    expected = named_leaves(lora.merge(network, adapters))
    for param, layer in merged.network.layer_keys(CONFIG):
        array = expected[param] if layer is None else expected[param][layer]
        np.testing.assert_allclose(merged.read((param, layer)), array, rtol=1e-6, atol=2e-6)


def test_a_merged_reader_keeps_dtypes_and_parameters_without_an_adapter(network):
    adapters = random_adapters(LoraConfig(rank=2, alpha=1.0, targets=(QKV,)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network)
    source = ArrayReader(NETWORKS["transformer"], half)
    reader = MergedReader(source, adapters)
    merged = named_leaves(lora.merge(half, adapters))
    for param, layer in reader.network.layer_keys(CONFIG):
        array = reader.read((param, layer))
        assert array.dtype == ml_dtypes.bfloat16
        if param == f"{QKV}/kernel":
            actual, expected = (np.asarray(x, np.float32) for x in (array, merged[param][layer]))
            np.testing.assert_allclose(actual, expected, rtol=2**-8, atol=1e-6)
            assert np.mean(actual == expected) > 0.99
        else:
            assert array.tobytes() == source.read((param, layer)).tobytes()
    with pytest.raises(ValueError, match="does not fit its kernel"):
        MergedReader(source, {"img_in": adapters[QKV]})
