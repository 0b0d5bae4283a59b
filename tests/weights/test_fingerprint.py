"""A network's short name: the same wherever and however it is stored, another for other values."""

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


def test_it_is_the_same_in_every_layout_and_on_every_mesh(networks, tmp_path):
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
def test_any_change_changes_it(arrays, change):
    before = arrays | {"final_norm/bias": np.zeros(16, np.float32)}
    after = before | change(before)
    assert fingerprint(before) != fingerprint(after)


def test_the_dtype_that_values_are_kept_in_does_not_matter():
    """Infinities and subnormals too: all that a bfloat16 can be, but for NaN."""
    bits = np.arange(2**16, dtype=np.uint16)
    every = bits[bits & 0x7FFF <= 0x7F80].view(ml_dtypes.bfloat16)
    assert fingerprint({"a": every}) == fingerprint({"a": every.astype(np.float32)})
    assert fingerprint({"a": every}) != fingerprint({"b": every})


def test_a_network_without_some_parameters_has_one_too(networks):
    reader = reader_of(networks["clip"])
    del reader.dtypes["final_norm/bias"]
    rest = {n: x for n, x in named_leaves(networks["clip"]).items() if n != "final_norm/bias"}
    assert fingerprint_of(reader) == fingerprint(rest)


def test_it_will_stay_what_it_is():
    """Runs and files remember it."""
    values = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    assert fingerprint({"blocks/a": values, "b": values[0, 0]}) == "5b865b72754ee4df"
