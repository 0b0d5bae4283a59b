"""Tests that weights of diffusers and transformers round trip through every layout bit for bit."""

import json
import types

import ml_dtypes
import numpy as np
import pytest

from kontext_jax.weights.export import write_bfl, write_diffusers, write_orbax
from kontext_jax.weights.networks import ALL_NETWORKS
from kontext_jax.weights.reading import OrbaxReader, open_file, open_folder

REASON = "needs the convert extra: pip install -e '.[convert]'"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from diffusers.loaders import single_file_utils  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow

FLUX_HEADS = dict(attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(16, 56, 56))
MAKERS = {
    "transformer": lambda: theirs.transformer(**FLUX_HEADS),
    "autoencoder": lambda: theirs.autoencoder((1, 2, 2), layers=1),
    "text_encoder": theirs.t5,
    "clip": lambda: theirs.clip(2),
    "dino": theirs.dino,
}
DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float16: np.dtype(np.float16),
}


def bits(tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def without_record(path) -> None:
    """Removes a file's metadata, which Black Forest Labs' files do not have."""
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("dtype", "shard_bytes"),
    [(torch.float32, 10**9), (torch.bfloat16, 20_000), (torch.float16, 10**9)],
    ids=["float32", "bfloat16 in shards", "float16"],
)
@pytest.mark.parametrize("kind", ALL_NETWORKS)
def test_weights_round_trip_bit_for_bit(tmp_path, kind, dtype, shard_bytes):
    network, original = ALL_NETWORKS[kind], MAKERS[kind]().to(dtype)
    saved = theirs.save(original, tmp_path / "saved", max_shard_size=shard_bytes)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    reader = open_folder(saved)
    assert set(reader.dtypes.values()) == {DTYPES[dtype]}
    if network.has_bfl_layout:
        write_bfl(reader, tmp_path / "bfl.safetensors", {})
        without_record(tmp_path / "bfl.safetensors")
        config, reader = reader.config, open_file(tmp_path / "bfl.safetensors")
        assert reader.config == config
    write_orbax({kind: reader}, tmp_path / "orbax", step=0, meta={})
    item = tmp_path / "orbax" / "checkpoints" / "0" / "params"
    reader = OrbaxReader(item, [kind], network, reader.config, {})
    write_diffusers(reader, tmp_path / "written", {}, max_shard_bytes=shard_bytes)

    kwargs = {"torch_dtype" if network.library == "diffusers" else "dtype": dtype}
    actual = type(original).from_pretrained(tmp_path / "written", **kwargs).state_dict()
    expected = original.state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        # transformers keeps parts of T5 in float32, which is lossless.
        np.testing.assert_array_equal(bits(actual[name].to(dtype)), bits(tensor), err_msg=name)


@pytest.mark.parametrize("kind", ALL_NETWORKS)
def test_settings_round_trip(tmp_path, kind):
    reader = open_folder(theirs.save(MAKERS[kind](), tmp_path / "saved"))
    write_diffusers(reader, tmp_path / "written", {})
    ours = json.loads((tmp_path / "written" / "config.json").read_text())
    ours = {name: value for name, value in ours.items() if not name.startswith("_")}
    theirs_values = json.loads((tmp_path / "saved" / "config.json").read_text())
    differ = {name for name in ours if ours[name] != theirs_values.get(name, ours[name])}
    # CLIP's projection, T5's dropout and padding ids do not affect FLUX. Old configs of CLIP have
    # the end id 2, which stands for the largest id.
    assert differ <= {"projection_dim", "dropout_rate", "eos_token_id", "pad_token_id"}, differ


def converter_for(width: int):
    """Returns diffusers' converter with its hard-coded width of 3072 replaced by ``width``."""
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    constants = function.__code__.co_consts
    assert constants.count(3072) == 1
    code = function.__code__.replace(
        co_consts=tuple(width if constant == 3072 else constant for constant in constants)
    )
    return types.FunctionType(code, function.__globals__, argdefs=function.__defaults__)


@pytest.mark.parametrize("kind", ["transformer", "autoencoder"])
def test_diffusers_converts_our_single_files_to_the_same_tensors(tmp_path, kind):
    original = MAKERS[kind]()
    reader = open_folder(theirs.save(original, tmp_path / "saved"))
    write_bfl(reader, tmp_path / "bfl.safetensors", {})
    tensors = load_file(tmp_path / "bfl.safetensors")
    if kind == "transformer":
        converted = converter_for(original.inner_dim)(tensors)
    else:
        converted = single_file_utils.convert_ldm_vae_checkpoint(tensors, original.config)
    expected = original.state_dict()
    assert set(converted) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(bits(converted[name]), bits(tensor), err_msg=name)
