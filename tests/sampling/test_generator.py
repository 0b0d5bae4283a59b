import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export

from kontext_jax import sharding
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, noise_id
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sampling import generator
from kontext_jax.sampling.generator import Generator, pack, reconstruct, with_room
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Example, unprompted

DATA = DataConfig(
    batch_size=2,
    geometry=GeometryConfig(sizes=((16, 16), (32, 16)), pixels_per_token=8),
    packing=PackingConfig(image_tokens=24, text_tokens=24, max_examples=3),
)


def image(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, width, 3), np.uint8)


def example(number: int, seed: int = 0) -> Example:
    """Alternates between square and wide targets; every third example has no context."""
    ids = np.random.default_rng((seed, number)).integers(3, 259, 6).astype(np.int32)
    contexts = (image(16, number + 50),) if number % 3 else ()
    return Example(f"{number}", image((16, 32)[number % 2], number), contexts, ids)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def generated(recipe, examples, data=DATA, num_devices=1, **sampler):
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    sampler = SamplerConfig(**{"num_steps": 2} | sampler)
    generate = Generator(examples, data, recipe.objective.config, sampler, mesh)
    return generate(networks_of(recipe.params["model"], recipe.frozen))


@pytest.fixture(scope="module")
def images(recipe):
    return generated(recipe, [example(i) for i in range(5)])


def test_images_are_in_order_and_have_the_target_s_size(images):
    assert [x.shape for x in images] == [(16, (16, 32)[i % 2], 3) for i in range(5)]
    assert all(x.dtype == np.uint8 and x.std() > 1 for x in images)


def test_an_image_depends_on_its_contexts_and_prompt_alone(recipe, images):
    """Not on targets, other examples or packing. Example 1 changes its prompt, 2 its context."""
    examples = [example(i)._replace(target=255 - example(i).target) for i in range(4)]
    examples[1] = example(1, seed=1)
    examples[2] = examples[2]._replace(contexts=(image(16, 99),))
    one_per_row = dataclasses.replace(DATA.packing, max_examples=1)
    others = generated(recipe, examples, dataclasses.replace(DATA, packing=one_per_row))
    distance = [np.abs(a.astype(int) - b).max() for a, b in zip(images, others, strict=False)]
    assert distance[0] <= 1 and distance[3] <= 1  # levels of 255, from rounding
    assert distance[1] > 3 and distance[2] > 3


def test_at_low_strength_images_stay_near_their_targets(recipe, images):
    examples = [example(i) for i in range(5)]
    near = generated(recipe, examples, num_steps=100, strength=0.01)
    starts = reconstruct(recipe.frozen["autoencoder"], [e.target for e in examples], one_device())
    for start, result, from_noise in zip(starts, near, images, strict=True):
        distance = np.abs(result.astype(int) - start).mean()
        assert distance < 0.2 * np.abs(from_noise.astype(int) - start).mean()


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("number", range(1, 21))
def test_every_example_is_in_one_batch(number, num_devices):
    """All batches have the same shape and hold the examples of their layout."""
    examples = [example(i) for i in range(number)]
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    batches, layouts = pack(examples, DATA, mesh, with_negatives=False)
    assert len(batches) == len(layouts) > 0
    assert sorted(i for layout in layouts for _, _, i in layout) == list(range(number))
    shapes = set()
    for batch, layout in zip(batches, layouts, strict=True):
        shapes.add(str(jax.tree.map(np.shape, batch)))
        assert len(batch.segments) % num_devices == 0
        segments = {(row, segment) for row, segment, _ in layout}
        assert len(segments) == len(layout)
        present = np.argwhere(batch.example_ids >= 0).tolist()
        assert segments == {(row, index + 1) for row, index in present}
        for row, segment, i in layout:
            in_segment = batch.segments[row] == segment
            target_tokens = examples[i].target.shape[1] // 8 * 2
            assert (in_segment & batch.is_target[row]).sum() == target_tokens
            assert in_segment.sum() == target_tokens + 4 * len(examples[i].contexts)
            text = batch.text_ids[row, batch.text_segments[row] == segment]
            assert text.tolist() == examples[i].text_ids.tolist()
            assert batch.example_ids[row, segment - 1] == noise_id(examples[i].id)
    assert len(shapes) == 1


def test_batches_are_assembled_on_access(monkeypatch):
    assembled, assemble = [], generator.assemble

    def recording(examples, *args):
        assembled.append([int(e.id) for e in examples])
        return assemble(examples, *args)

    monkeypatch.setattr(generator, "assemble", recording)
    batches, layouts = pack([example(i) for i in range(8)], DATA, one_device(), False)
    assert (len(batches), assembled) == (2, [])
    for number in (1, 0, 1):
        assembled.clear()
        batch = batches[number]
        rows = [[i for row, _, i in layouts[number] if row == r] for r in range(2)]
        assert assembled == rows and batch.segments.shape[0] == 2
    for number in (2, -1):
        with pytest.raises(IndexError, match=f"There is no batch {number} of 2"):
            batches[number]


def test_done_batches_are_skipped_and_the_others_repeat_to_the_last_bit(recipe):
    examples = [example(i) for i in range(8)]
    one_row = dataclasses.replace(DATA, batch_size=1)
    sampler = SamplerConfig(num_steps=2)
    networks = networks_of(recipe.params["model"], recipe.frozen)
    generate = Generator(examples, one_row, recipe.objective.config, sampler, one_device())
    batches = list(generate.batches(networks))
    assert [batch.number for batch in batches] == list(range(len(batches))) and len(batches) > 2
    assert sorted(i for batch in batches for i in batch.indices) == list(range(8))
    assert all(batch.seconds > 0 for batch in batches)
    images = {i: x for batch in batches for i, x in zip(batch.indices, batch.images, strict=True)}
    partial = next(batch for batch in batches if len(batch.indices) > 1)
    complete = next(batch for batch in batches if batch is not partial)
    done = {*complete.indices, *partial.indices[1:]}
    resumed = Generator(examples, one_row, recipe.objective.config, sampler, one_device())
    repeated = list(resumed.batches(networks, done))
    expected = [batch.number for batch in batches if batch is not complete]
    assert [batch.number for batch in repeated] == expected
    for batch in repeated:
        assert batch.indices == batches[batch.number].indices
        for i, x in zip(batch.indices, batch.images, strict=True):
            np.testing.assert_array_equal(x, images[i])
    for i, x in enumerate(generate(networks)):
        np.testing.assert_array_equal(x, images[i])
    assert list(resumed.batches(networks, range(8))) == []


@pytest.mark.parametrize("where", ["target", "padding"])
def test_latents_that_are_not_finite_are_reported_except_in_padding(recipe, where):
    examples = [example(i) for i in range(5)]
    generate = Generator(
        examples, DATA, recipe.objective.config, SamplerConfig(num_steps=1), one_device()
    )
    networks, sample = networks_of(recipe.params["model"], recipe.frozen), generate._latents

    def broken(networks, batch, *args, **kwargs):
        latents = np.array(sample(networks, batch, *args, **kwargs))
        if where == "padding":
            latents[np.asarray(batch.segments) == 0] = np.nan
        else:
            latents[tuple(np.argwhere(np.asarray(batch.is_target))[-1])] = np.inf
        return latents

    assert all(batch.finite for batch in generate.batches(networks))
    generate._latents = broken
    padded = [(generate._batches[i].segments == 0).any() for i in range(len(generate._batches))]
    assert all(padded)
    assert {batch.finite for batch in generate.batches(networks)} == {where == "padding"}


def test_nothing_compiles_after_warm_up(recipe, caplog):
    examples = [example(i) for i in range(5)]
    mesh = one_device()
    sampler = SamplerConfig(num_steps=1)
    generate = Generator(examples, DATA, recipe.objective.config, sampler, mesh)
    networks = networks_of(recipe.params["model"], recipe.frozen)
    generate.warm_up(networks)
    with jax.log_compiles():
        generate(networks)
    assert not [line for line in caplog.messages if "XLA compilation" in line]


@pytest.mark.slow
def test_guidance_changes_images_and_the_number_of_devices_does_not(recipe, images):
    examples = [example(i) for i in range(5)]
    sharded = generated(recipe, examples, num_devices=4)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(images, sharded, strict=True)) <= 1
    guided = generated(recipe, examples, cfg_scale=3.0)
    assert min(np.abs(a.astype(int) - b).max() for a, b in zip(images, guided, strict=True)) > 3


def test_negatives_have_empty_prompts_for_both_encoders(flux_tokenizers):
    text = TextConfig(clip_tokenizer=str(flux_tokenizers / "tokenizer"), clip_max_tokens=4)
    tokenizer = Tokenizer(text)
    examples = [
        example(i)._replace(text_ids=tokenizer("red"), clip_ids=tokenizer.clip("red"))
        for i in range(2)
    ]
    data, mesh = dataclasses.replace(DATA, text=text), one_device()
    batches, layouts = pack(examples, data, mesh, with_negatives=True)
    positive, negative, layout = batches[0], unprompted(batches[0]), layouts[0]
    assert len(layout) == 2
    for row, segment, _ in layout:
        assert positive.clip_ids[row, segment - 1].tolist() == [518, 513, 519, 519]
        assert negative.clip_ids[row, segment - 1].tolist() == [518, 519, 519, 519]
        assert negative.text_ids[row, negative.text_segments[row] == segment].tolist() == [1]


def test_reconstructions_are_in_order(recipe):
    autoencoder = recipe.frozen["autoencoder"]
    originals = [image((16, 32)[i % 2], i) for i in range(3)]
    together = reconstruct(autoencoder, originals, one_device())
    for original, result in zip(originals, together, strict=True):
        assert result.shape == original.shape
    alone = reconstruct(autoencoder, originals[2:], one_device())
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert np.abs(together[2].astype(int) - together[0]).max() > 3


def lowered_for_tpus(program):
    """Returns a stand-in for ``program``: it checks the lowering for TPUs, and returns zeros.

    The lowered program has to contain the TPU kernel.
    """

    def call(*args, **kwargs):
        lowered = export.export(program, platforms=["tpu"])(*args, **kwargs)
        assert "tpu_custom_call" in lowered.mlir_module()
        (out,) = lowered.out_avals
        return np.zeros(out.shape, out.dtype)

    return call


def test_on_tpus_the_autoencoder_s_attention_is_split_over_the_mesh(
    recipe, random_network, monkeypatch
):
    """Its single head is wide enough for the kernel, which XLA cannot partition by itself."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    wide = AutoencoderConfig.tiny(channels=32, channel_multipliers=(1, 1, 4))
    autoencoder = random_network(lambda: Autoencoder(wide, rngs=nnx.Rngs(0)))
    networks = networks_of(recipe.params["model"], {"autoencoder": autoencoder})
    mesh = make_mesh(MeshConfig())
    networks = jax.device_put(networks, sharding.shardings_of(networks, mesh))
    config = recipe.objective.config
    examples = [example(i) for i in range(2)]
    generate = Generator(examples, DATA, config, SamplerConfig(num_steps=1), mesh)
    generate._latents, generate._decode = map(
        lowered_for_tpus, (generate._latents, generate._decode)
    )
    assert [x.shape for x in generate(networks)] == [x.target.shape for x in examples]

    monkeypatch.setattr(generator, "_reconstruct", lowered_for_tpus(generator._reconstruct))
    reconstruct(networks["autoencoder"], [examples[0].target], mesh)


def test_rows_are_long_enough_for_the_largest_example():
    examples = [example(i) for i in range(4)]
    assert with_room(DATA, examples) == DATA
    short = dataclasses.replace(DATA.packing, image_tokens=5, text_tokens=2)
    packing = with_room(dataclasses.replace(DATA, packing=short), examples).packing
    assert (packing.image_tokens, packing.text_tokens, packing.max_examples) == (12, 6, 3)
    one_per_row = dataclasses.replace(DATA, packing=PackingConfig())
    packing = with_room(one_per_row, examples).packing  # no longer than needed
    assert (packing.image_tokens, packing.text_tokens, packing.max_examples) == (12, 6, 1)
