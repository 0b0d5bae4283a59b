"""Tests of writing weights: other libraries' formats, one layer in memory, and verification."""

import dataclasses
import json
import weakref

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from kontext_jax.tree_paths import by_name, named_leaves
from kontext_jax.weights.export import check_copy, write_bfl, write_diffusers, write_orbax
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.networks import NETWORKS, architecture
from kontext_jax.weights.reading import ArrayReader, OrbaxReader, open_file, open_folder
from tests.training.test_checkpoint import stored_chunks
from tests.weights.small import CONFIGS, assert_same, reader_of, tensors_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Watched(np.ndarray):
    """An array whose live copies and casts are counted."""

    alive: dict[int, int] = {}

    def __array_finalize__(self, _):
        if self.base is None:  # a view owns no memory
            Watched.alive[id(self)] = self.nbytes
            weakref.finalize(self, Watched.alive.pop, id(self))


class WatchedReader(ArrayReader):
    """Records the keys it reads, and the bytes of live arrays at every read."""

    def __init__(self, module):
        super().__init__(NETWORKS["transformer"], module)
        self.keys, self.held = [], []

    def read(self, key):
        self.keys.append(key)
        self.held.append(sum(Watched.alive.values()))
        values = super().read(key)
        array = np.ndarray.__new__(Watched, values.shape, values.dtype)
        array[...] = values
        return array


@pytest.fixture
def watched(networks):
    assert not Watched.alive
    return WatchedReader(networks["transformer"])


def all_keys(reader):
    return reader.network.layer_keys(reader.config)


def largest(reader) -> int:
    """Returns the bytes of the largest layer of a parameter."""
    shapes = reader.network.shapes(reader.config)
    return 4 * max(
        np.prod(shapes[param][layer is not None :], dtype=int) for param, layer in all_keys(reader)
    )


def test_shards_have_at_most_the_maximum_size_and_hold_every_tensor(networks, tmp_path):
    reader = reader_of(networks["transformer"])
    write_diffusers(reader, tmp_path / "out", {"step": 3}, max_shard_bytes=8000)
    index = json.loads(
        (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    expected = tensors_of(networks["transformer"], "diffusers")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    shards = sorted(set(index["weight_map"].values()))
    number = len(shards)
    assert number > 5 and shards[0] == f"diffusion_pytorch_model-00001-of-{number:05d}.safetensors"
    stored = {}
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert sum(a.nbytes for a in tensors.values()) <= 8000 or len(tensors) == 1
        stored |= tensors
        with safe_open(tmp_path / "out" / shard, framework="np") as opened:
            metadata = opened.metadata()
        assert metadata["format"] == "pt"
        network = json.loads(json.dumps(architecture(reader.config)))
        assert json.loads(metadata["kontext_jax"]) == {"step": 3, "network": network}
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        assert stored[name].tobytes() == array.tobytes(), name
    assert_same(open_folder(tmp_path / "out"), reader)


@pytest.mark.parametrize(("name", "other"), [("mlp_ratio", 2.0), ("theta", 500.0)])
def test_settings_that_diffusers_does_not_support_are_refused(networks, tmp_path, name, other):
    reader = reader_of(networks["transformer"])
    reader.config = dataclasses.replace(reader.config, **{name: other})
    with pytest.raises(
        ValueError, match="supports only mlp_ratio 4 and theta 10000, not .*" + str(other)
    ):
        write_diffusers(reader, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_cast_weights_are_written_and_checked(networks, tmp_path):
    reader = reader_of(networks["text_encoder"])
    write_diffusers(reader, tmp_path / "out", {}, BFLOAT16)
    stored = open_folder(tmp_path / "out")
    assert set(stored.dtypes.values()) == {BFLOAT16}
    check_copy(reader, stored, BFLOAT16)
    with pytest.raises(
        WeightsError, match="written text_encoder differs from its source in .*shared/embedding"
    ):
        check_copy(reader, stored)  # other dtypes


class Changed(ArrayReader):
    """A reader that flips the last bit of one element in the layers of some keys."""

    def __init__(self, module, *keys):
        super().__init__(NETWORKS["clip"], module)
        self.keys = keys

    def read(self, key):
        array = super().read(key).copy()
        if key in self.keys:
            array.view(np.uint32).flat[-1] ^= 1
        return array


def test_one_message_names_every_layer_that_differs(networks):
    reader = reader_of(networks["clip"])
    check_copy(reader, Changed(networks["clip"]))
    keys = ("blocks/norm1/bias", 1), ("position_embedding", None)
    with pytest.raises(WeightsError) as error:
        check_copy(reader, Changed(networks["clip"], *keys))
    assert str(error.value) == (
        "The written clip differs from its source in position_embedding, layer 1 of "
        "blocks/norm1/bias; check the disk for errors."
    )


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_files_are_written_with_one_layer_in_memory(watched, tmp_path, layout):
    if layout == "diffusers":
        write_diffusers(watched, tmp_path / "out", {}, max_shard_bytes=8000)
    else:
        write_bfl(watched, tmp_path / "out.safetensors", {})
    assert watched.keys == 2 * all_keys(watched)  # written, then compared
    assert 0 < max(watched.held) <= 2 * largest(watched)


def test_orbax_checkpoints_are_written_with_one_layer_in_memory(watched, tmp_path):
    write_orbax({"transformer": watched}, tmp_path, 5, {}, BFLOAT16)
    keys = all_keys(watched)
    written, compared = watched.keys[: len(keys)], watched.keys[len(keys) :]
    assert sorted(written, key=str) == sorted(keys, key=str) and compared == keys
    assert watched.held[: len(keys)] == [0] * len(keys)
    assert 0 < max(watched.held) <= 2 * largest(watched)


@pytest.fixture(scope="module")
def checkpoint(networks, tmp_path_factory):
    """A checkpoint of step 5 with the transformer in bfloat16 and CLIP in float32."""
    folder = tmp_path_factory.mktemp("orbax")
    half = jax.tree.map(lambda x: np.asarray(x).astype(BFLOAT16), networks["transformer"])
    readers = {"transformer": reader_of(half), "clip": reader_of(networks["clip"])}
    write_orbax(readers, folder, 5, {"networks": {"clip": architecture(CONFIGS["clip"])}})
    return folder, {"transformer": half, "clip": networks["clip"]}


def assert_arrays(tree, expected):
    actual, expected = named_leaves(tree), named_leaves(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        assert np.asarray(actual[name]).tobytes() == np.asarray(array).tobytes(), name


def test_orbax_alone_restores_our_checkpoint_onto_devices(checkpoint):
    """Names, shapes and values come from the checkpoint."""
    folder, expected = checkpoint
    with ocp.CheckpointManager(
        folder / "checkpoints",
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        assert manager.latest_step() == 5
        tree = manager.item_metadata(5)["params"].tree
        split = jax.sharding.NamedSharding(
            jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), jax.sharding.PartitionSpec()
        )
        restore_args = jax.tree.map(
            lambda _: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=split), tree
        )
        restored = manager.restore(
            5,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeRestore(restore_args=restore_args),
                meta=ocp.args.JsonRestore(),
            ),
        )
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored.params))
    assert_arrays(restored.params, by_name(expected))
    network = json.loads(json.dumps(architecture(CONFIGS["clip"])))
    assert restored.meta == {"networks": {"clip": network}}


def test_orbax_alone_restores_our_checkpoint_into_numpy(checkpoint):
    folder, expected = checkpoint
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(folder / "checkpoints" / "5" / "params")
    assert_arrays(tree, by_name(expected))


def test_our_reader_reads_the_checkpoint_layer_by_layer(checkpoint):
    folder, expected = checkpoint
    for name, network in expected.items():
        reader = reader_of(network)
        item = folder / "checkpoints" / "5" / "params"
        assert_same(OrbaxReader(item, [name], reader.network, reader.config, {}), reader)


def test_orbax_chunks_are_single_layers_or_full_unstacked_arrays(checkpoint):
    folder, networks = checkpoint
    expected = {}
    for name, network in networks.items():
        layers = dict(all_keys(reader_of(network)))
        for param, array in named_leaves(network).items():
            shape = array.shape if layers[param] is None else (1, *array.shape[1:])
            expected[f"{name}/{param}"] = shape
    assert expected["transformer/single_blocks/linear2/bias"] == (1, 16)
    assert expected["clip/token_embedding/embedding"] == (24, 16)
    assert stored_chunks(folder / "checkpoints" / "5" / "params") == expected


def test_a_bfl_export_is_one_file_with_our_record(networks, tmp_path):
    reader = reader_of(networks["autoencoder"])
    write_bfl(reader, tmp_path / "new" / "ae.safetensors", {"step": 3})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ae.safetensors"]
    stored = load_file(tmp_path / "new" / "ae.safetensors")
    expected = tensors_of(networks["autoencoder"], "bfl")
    assert stored.keys() == expected.keys()
    assert all(stored[name].tobytes() == array.tobytes() for name, array in expected.items())
    assert open_file(tmp_path / "new" / "ae.safetensors").record["step"] == 3
