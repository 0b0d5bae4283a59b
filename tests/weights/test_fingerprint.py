"""Tests of fingerprints: equal for equal values however they are stored, else different."""

import ml_dtypes
import numpy as np
import pytest

from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.export import write_bfl, write_diffusers, write_orbax
from kontext_jax.weights.fingerprint import fingerprint, fingerprint_of
from kontext_jax.weights.loading import load
from kontext_jax.weights.reading import OrbaxReader, open_file, open_folder
from tests.weights.small import reader_of


def test_the_fingerprint_is_equal_in_every_layout_and_on_every_mesh(networks, tmp_path):
    reader = reader_of(networks["transformer"])
    expected = fingerprint(networks["transformer"])
    assert fingerprint_of(reader) == expected
    assert fingerprint(load(reader, reader.config, make_mesh(MeshConfig(fsdp=8)))) == expected

    write_diffusers(reader, tmp_path / "diffusers", {}, max_shard_bytes=5000)
    assert fingerprint_of(open_folder(tmp_path / "diffusers")) == expected
    write_bfl(reader, tmp_path / "bfl.safetensors", {})
    assert fingerprint_of(open_file(tmp_path / "bfl.safetensors")) == expected
    write_orbax({"transformer": reader}, tmp_path, 7, {})
    item = tmp_path / "checkpoints" / "7" / "params"
    stored = OrbaxReader(item, ["transformer"], reader.network, reader.config, {})
    assert fingerprint_of(stored) == expected


@pytest.fixture(scope="module")
def arrays(networks):
    return {name: np.asarray(x) for name, x in named_leaves(networks["clip"]).items()}


def last_bit(arrays):
    bits = arrays["blocks/mlp/fc1/kernel"].view(np.uint32).copy()
    bits[1, 3, 5] ^= 1
    return {"blocks/mlp/fc1/kernel": bits.view(np.float32)}


def sign_of_zero(arrays):
    return {"final_norm/bias": -arrays["final_norm/bias"]}


def two_layers(arrays):
    return {"blocks/attention/q/kernel": arrays["blocks/attention/q/kernel"][::-1]}


def two_elements(arrays):
    values = arrays["position_embedding"].copy()
    values[0, 0], values[2, 3] = values[2, 3], values[0, 0]
    return {"position_embedding": values}


def two_parameters(arrays):
    q, k = "blocks/attention/q/kernel", "blocks/attention/k/kernel"
    return {q: arrays[k], k: arrays[q]}


def transposed(arrays):
    return {"blocks/attention/q/kernel": arrays["blocks/attention/q/kernel"].swapaxes(1, 2)}


@pytest.mark.parametrize(
    "change", [last_bit, sign_of_zero, two_layers, two_elements, two_parameters, transposed]
)
def test_any_change_of_values_changes_the_fingerprint(arrays, change):
    before = arrays | {"final_norm/bias": np.zeros(16, np.float32)}
    after = before | change(before)
    assert fingerprint(before) != fingerprint(after)


def test_the_fingerprint_does_not_depend_on_the_dtype():
    """For all values of bfloat16 except NaN, including infinities and subnormals."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits[bits & 0x7FFF <= 0x7F80].view(ml_dtypes.bfloat16)
    assert fingerprint({"a": values}) == fingerprint({"a": values.astype(np.float32)})
    assert fingerprint({"a": values}) != fingerprint({"b": values})


def test_missing_parameters_are_left_out_of_the_fingerprint(networks):
    reader = reader_of(networks["clip"])
    del reader.dtypes["final_norm/bias"]
    rest = {n: x for n, x in named_leaves(networks["clip"]).items() if n != "final_norm/bias"}
    assert fingerprint_of(reader) == fingerprint(rest)


def test_the_fingerprint_of_fixed_values_never_changes():
    """Runs and files store fingerprints."""
    values = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    assert fingerprint({"blocks/a": values, "b": values[0, 0]}) == "5b865b72754ee4df"
