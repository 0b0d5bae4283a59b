"""Held-out losses against the formula, and resuming from their file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.config import LossConfig
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, noise_id
from kontext_jax.evaluation import held_out_loss as module
from kontext_jax.evaluation.held_out_loss import (
    MLPERF,
    check_mlperf,
    held_out_loss,
    mlperf_eval_steps,
    summarise_losses,
)
from kontext_jax.geometry import GeometryConfig, num_tokens, position_ids, size_of
from kontext_jax.models.autoencoder import pack_latents, to_pixels
from kontext_jax.models.flux import Flux
from kontext_jax.models.t5 import pool
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import pack
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Example

GEOMETRY = GeometryConfig(sizes=((16, 16), (32, 16)), pixels_per_token=8)
DATA = DataConfig(
    batch_size=2,
    geometry=GEOMETRY,
    packing=PackingConfig(image_tokens=24, text_tokens=24, max_examples=3),
)
NUMBER = 11  # not a multiple of examples per row, rows per batch, or levels


def image(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, width, 3), np.uint8)


def example(number: int) -> Example:
    """An edit with a wide target for every third number, otherwise text-to-image and square."""
    ids = np.random.default_rng(number).integers(3, 259, 6).astype(np.int32)
    wide = number % 3 == 0
    contexts = (image(16, number + 50),) if wide else ()
    return Example(f"example {number}", image(32 if wide else 16, number), contexts, ids)


EXAMPLES = [example(i) for i in range(NUMBER)]


@pytest.fixture(scope="module")
def networks(recipe):
    return networks_of(recipe.params["model"], recipe.frozen)


@pytest.fixture(scope="module")
def computed(recipe, networks):
    """A function that returns rows; keywords override `LossConfig`, with one level per example."""

    def run(
        examples=EXAMPLES,
        data=DATA,
        num_devices=1,
        networks=networks,
        file=None,
        guidance=1.0,
        **kw,
    ):
        mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
        objective = dataclasses.replace(recipe.objective.config, guidance=guidance)
        config = LossConfig(**{"grid": "left", "levels": "index"} | kw)
        return held_out_loss(networks, examples, data, objective, config, mesh, file)

    return run


@pytest.fixture(scope="module")
def rows(computed):
    return computed()


def values(rows) -> np.ndarray:
    return np.array([row["loss"] for row in rows])


@jax.jit
def _latents(autoencoder, pixels):
    mean, logvar = autoencoder.moments(to_pixels(pixels)[None])
    return tuple(
        pack_latents(x)[0] for x in (autoencoder.encode(to_pixels(pixels)[None]), jnp.exp(logvar))
    )


@jax.jit
def _velocity(networks, ids, latents, t, positions):
    """The velocity of a single example, in a row without padding."""
    segments = jnp.ones((1, len(latents)), jnp.int32)
    text_segments = jnp.ones((1, len(ids)), jnp.int32)
    text = networks["text_encoder"](ids[None], text_segments)
    pooled = pool(text, text_segments, 1)
    return networks["transformer"](
        latents[None],
        text,
        pooled,
        t.reshape(1, 1),
        positions=positions[None],
        segments=segments,
        text_segments=text_segments,
    )[0]


def normals(key, number: int, channels: int) -> np.ndarray:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))
    return np.asarray(jax.vmap(lambda k: jax.random.normal(k, (channels,)))(keys), np.float64)


def expected(networks, one: Example, level: int, t: float, seed: int = 0, sampled: bool = False):
    """Equation (1) of the module for a single example, in float64 except for the networks."""
    encoded = [_latents(networks["autoencoder"], x) for x in (one.target, *one.contexts)]
    clean = np.concatenate([np.asarray(mean, np.float64) for mean, _ in encoded])
    target = num_tokens(size_of(one.target), 8)
    key = jax.random.key(seed)
    for word in module._hash(one.id):
        key = jax.random.fold_in(key, word)
    if sampled:
        variance, scale = encoded[0][1], networks["autoencoder"].config.scale_factor
        noise = normals(jax.random.fold_in(key, 1), target, clean.shape[1])
        clean[:target] += scale * np.sqrt(np.asarray(variance, np.float64)) * noise
    key = jax.random.fold_in(jax.random.fold_in(key, 0), level)
    noise = normals(key, target, clean.shape[1])
    tokens = clean.copy()
    tokens[:target] = (1 - t) * clean[:target] + t * noise
    sizes = [size_of(x) for x in (one.target, *one.contexts)]
    positions = position_ids(sizes[0], sizes[1:], GEOMETRY)
    given = (one.text_ids, tokens.astype(np.float32), np.float32(t), positions)
    velocity = np.asarray(_velocity(networks, *map(jnp.asarray, given)), np.float64)[:target]
    return np.mean((velocity - (noise - clean[:target])) ** 2)


def test_losses_match_the_formula(networks, rows):
    """Example k at level k mod 8 of t = i/8, from t = 0 to 7/8."""
    assert [(r["id"], r["index"]) for r in rows] == [(e.id, i) for i, e in enumerate(EXAMPLES)]
    assert [r["level"] for r in rows] == [*range(8), 0, 1, 2]
    assert [r["t"] for r in rows] == [i / 8 for i in [*range(8), 0, 1, 2]]
    right = [
        expected(networks, e, row["level"], row["t"]) for e, row in zip(EXAMPLES, rows, strict=True)
    ]
    np.testing.assert_allclose(values(rows), right, rtol=1e-5)


def test_losses_match_the_formula_at_all_levels_of_a_middle_grid(networks, computed):
    """Thirds are not representable in bfloat16, so a rounded time would show."""
    rows = computed(EXAMPLES[:4], num_times=3, levels="all", grid="middle", seed=5)
    assert [(r["index"], r["level"]) for r in rows] == [(i, j) for i in range(4) for j in range(3)]
    assert [r["t"] for r in rows[:3]] == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=1e-12)
    right = [expected(networks, EXAMPLES[r["index"]], r["level"], r["t"], seed=5) for r in rows]
    np.testing.assert_allclose(values(rows), right, rtol=1e-5)
    rounded = float(jnp.asarray(1 / 6, jnp.bfloat16).astype(jnp.float32))
    other = expected(networks, EXAMPLES[0], 0, rounded, seed=5)
    assert abs(other / rows[0]["loss"] - 1) > 5e-5


def test_levels_by_index_are_a_subset_of_all_levels(computed, rows):
    every = {(r["index"], r["level"]): r for r in computed(levels="all")}
    assert len(every) == 8 * NUMBER
    assert len(set(values(every.values()))) == 8 * NUMBER
    same = [every[r["index"], r["level"]] for r in rows]
    np.testing.assert_allclose(values(same), values(rows), rtol=1e-5)
    assert [r["t"] for r in same] == [r["t"] for r in rows]


def test_dropout_packing_and_other_examples_change_no_loss(computed, rows):
    dropped = dataclasses.replace(DATA, caption_dropout=1.0, context_dropout=1.0)
    assert computed(data=dropped) == rows
    one_a_row = PackingConfig(image_tokens=24, text_tokens=8, max_examples=1)
    alone = dataclasses.replace(DATA, batch_size=3, packing=one_a_row)
    np.testing.assert_allclose(values(computed(data=alone)), values(rows), rtol=1e-5)
    np.testing.assert_allclose(values(computed(EXAMPLES[:5])), values(rows)[:5], rtol=1e-5)


def test_prompts_contexts_and_seeds_change_the_losses(computed, rows):
    others = [e._replace(text_ids=e.text_ids[:3], contexts=()) for e in EXAMPLES]
    changed = np.abs(values(computed(others)) / values(rows) - 1)
    assert changed.min() > 1e-5 and changed[::3].min() > 1e-3
    assert np.abs(values(computed(seed=1)) / values(rows) - 1).min() > 1e-4


def test_the_number_of_devices_changes_no_loss(computed, rows):
    spread = computed(num_devices=8)
    np.testing.assert_allclose(values(spread), values(rows), rtol=1e-5)
    assert [r | {"loss": 0} for r in spread] == [r | {"loss": 0} for r in rows]


@pytest.fixture(scope="module")
def zeros(networks):
    """Networks whose transformer returns 0."""
    transformer = jax.tree.map(jnp.zeros_like, networks["transformer"])
    return networks | {"transformer": transformer}


def test_a_zero_transformer_has_the_mean_square_of_the_velocity(zeros, computed):
    """That is 1 + E[x^2] at every time."""
    large = [
        Example(f"{i}", np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8), (), ids)
        for i, ids in enumerate([np.arange(3, 9, dtype=np.int32)] * 8)
    ]
    data = dataclasses.replace(
        DATA,
        geometry=GeometryConfig(sizes=((64, 64),), pixels_per_token=8),
        packing=PackingConfig(image_tokens=64, text_tokens=8, max_examples=1),
    )
    losses = values(computed(large, data, networks=zeros))
    squares = [np.mean(np.asarray(_latents(zeros["autoencoder"], e.target)[0]) ** 2) for e in large]
    np.testing.assert_allclose(losses, 1 + np.array(squares), rtol=0.15)
    assert losses.mean() == pytest.approx(1 + np.mean(squares), rel=0.03)


def test_every_example_has_different_noise_on_any_shard(zeros, computed):
    """One image under 16 ids at one time: the losses differ only by their noise."""
    twins = [EXAMPLES[1]._replace(id=f"{i}") for i in range(16)]
    data = dataclasses.replace(DATA, batch_size=8)
    losses = values(computed(twins, data, num_devices=8, networks=zeros, num_times=1))
    assert len(set(losses)) == 16
    again = computed(twins[::-1], data, num_devices=8, networks=zeros, num_times=1)
    np.testing.assert_allclose(values(again)[::-1], losses, rtol=1e-6)


def test_sampled_latents_match_the_formula(networks, computed, rows):
    drawn = computed(EXAMPLES[:5], sample_latents=True)
    right = [
        expected(networks, e, row["level"], row["t"], sampled=True)
        for e, row in zip(EXAMPLES, drawn, strict=False)
    ]
    np.testing.assert_allclose(values(drawn), right, rtol=1e-5)
    assert np.abs(values(drawn) / values(rows)[:5] - 1).min() > 1e-4


def test_guidance_comes_from_the_objective(recipe, computed, random_network):
    config = dataclasses.replace(recipe.objective.config.transformer, guidance_embed=True)
    guided = random_network(lambda: Flux(config, rngs=nnx.Rngs(0)))
    networks = networks_of(recipe.params["model"] | {"transformer": guided}, recipe.frozen)
    few = EXAMPLES[1:3]
    low, high = (values(computed(few, networks=networks, guidance=g)) for g in (1.0, 4.0))
    assert np.abs(low / high - 1).min() > 1e-4


def test_means_are_over_examples_not_over_means(rows):
    kinds = {e.id: "edit" if e.contexts else "text_to_image" for e in EXAMPLES}
    summary = summarise_losses(rows, kinds)
    loss = values(rows)
    assert summary["count"] == NUMBER
    assert summary["mean"] == pytest.approx(loss.mean(), rel=1e-12)
    assert [x["count"] for x in summary["levels"]] == [2, 2, 2, 1, 1, 1, 1, 1]
    for i, level in enumerate(summary["levels"]):
        assert (level["level"], level["t"]) == (i, i / 8)
        assert level["mean"] == pytest.approx(loss[i::8].mean(), rel=1e-12)
        assert level["sum"] == pytest.approx(loss[i::8].sum(), rel=1e-12)
    of_means = np.mean([x["mean"] for x in summary["levels"]])
    assert abs(of_means / summary["mean"] - 1) > 1e-3
    edits = summary["kinds"]["edit"]
    assert (edits["count"], summary["kinds"]["text_to_image"]["count"]) == (4, 7)
    assert edits["mean"] == pytest.approx(loss[::3].mean(), rel=1e-12)
    assert [x["level"] for x in edits["levels"]] == [0, 1, 3, 6]


def test_sums_do_not_lose_small_losses():
    rows = [{"id": f"{i}", "level": 0, "t": 0.0, "loss": x} for i, x in enumerate([1e16, 1, 1, 1])]
    assert summarise_losses(rows)["sum"] == 1e16 + 3


def test_summaries_need_losses_and_all_kinds(rows):
    with pytest.raises(ValueError, match="no losses"):
        summarise_losses([])
    with pytest.raises(ValueError, match="example 1 "):
        summarise_losses(rows, {"example 0": "edit"})


def test_a_file_truncated_at_any_byte_is_resumed(computed, rows, tmp_path):
    """The rows and the file are the same as without the truncation."""
    file = tmp_path / "new" / "losses.jsonl"
    assert computed(file=file) == rows
    complete = file.read_bytes()
    assert len(complete.splitlines()) == 1 + NUMBER
    header = complete.index(b"\n") + 1
    cuts = {0, 1, header - 1, header, header + 1, len(complete) - 1}
    for cut in sorted(cuts | set(range(header, len(complete), 173))):
        file.write_bytes(complete[:cut])
        assert computed(file=file) == rows
        assert file.read_bytes() == complete


def test_stored_losses_are_not_computed_again(computed, rows, tmp_path, monkeypatch):
    file = tmp_path / "losses.jsonl"
    computed(file=file)
    lines = file.read_text().splitlines(keepends=True)
    order = [json.loads(line)["index"] for line in lines[1:]]
    _, layouts = pack(EXAMPLES, DATA, make_mesh(MeshConfig(), jax.devices()[:1]), False)
    assert len(layouts) > 1 and len(layouts[1]) > 1
    assert order == [i for layout in layouts for _, _, i in layout]
    done = len(layouts[0])
    file.write_text("".join(lines[: 1 + done + 1]))  # the first batch, and a line of the second
    calls = []
    losses_of = module._batch_losses

    def counted(networks, batch, layout, *args):
        calls.append(layout)
        return losses_of(networks, batch, layout, *args)

    monkeypatch.setattr(module, "_batch_losses", counted)
    assert computed(file=file) == rows
    assert calls == layouts[1:]
    assert computed(file=file) == rows
    assert calls == layouts[1:]


def test_a_file_of_other_losses_is_refused(computed, zeros, tmp_path):
    file = tmp_path / "losses.jsonl"
    few = EXAMPLES[:2]
    computed(few, file=file)
    before = file.read_bytes()
    other = [few[0], few[1]._replace(text_ids=few[1].text_ids + np.int32(1))]
    for kw, named in [
        ({"seed": 1}, "different seed: "),
        ({"grid": "middle", "levels": "all"}, "different grid and levels: "),
        ({"networks": zeros}, "different networks: "),
        ({"guidance": 2.0}, "different guidance: "),
        ({"examples": other}, "different examples: "),
    ]:
        with pytest.raises(ValueError, match=named):
            computed(**{"examples": few, "file": file} | kw)
    for text in ("notes", "notes\n", "[]\n", before.decode() + "{}\n", before.decode() + "{\n\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="not a file of held-out losses"):
            computed(few, file=file)
        assert file.read_text() == text


def test_batches_must_hold_every_example_once(computed, monkeypatch):
    """A missing last batch, a repeated last batch, and batches in another order than layouts."""

    def changed(change):
        def packed(*args, **kwargs):
            batches, layouts = pack(*args, **kwargs)
            return change(list(batches), layouts)

        monkeypatch.setattr(module, "pack", packed)

    changed(lambda batches, layouts: (batches[:-1], layouts[:-1]))
    with pytest.raises(RuntimeError, match="example .* 0 times"):
        computed()
    changed(lambda batches, layouts: (batches + batches[-1:], layouts + layouts[-1:]))
    with pytest.raises(RuntimeError, match="example .* 2 times"):
        computed()
    changed(lambda batches, layouts: (batches[::-1], layouts))
    with pytest.raises(RuntimeError, match="The batch with example .* does not match its layout"):
        computed()


def test_ids_must_be_unique(computed):
    with pytest.raises(ValueError, match="example 3 occurs 2 times"):
        computed([*EXAMPLES, EXAMPLES[3]])


def test_ids_that_collide_in_31_bits_have_different_noise():
    numbers: dict[int, str] = {}
    pairs = []
    for i in range(200_000):
        name = f"coco-{i * 7919}"
        pairs += [(numbers[noise_id(name)], name)] if noise_id(name) in numbers else []
        numbers[noise_id(name)] = name
    assert pairs
    assert all(module._hash(a).tolist() != module._hash(b).tolist() for a, b in pairs)


def test_mlperf_s_protocol():
    assert MLPERF.times == (0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8)
    counts = np.bincount([MLPERF.levels_of(i)[0] for i in range(module.MLPERF_SAMPLES)])
    assert counts.tolist() == [3712] * 8
    check_mlperf(29_696)
    with pytest.raises(ValueError, match="29696 examples, but this one has 29695: "):
        check_mlperf(29_695)
    assert [mlperf_eval_steps(size) for size in (512, 2048, 2304)] == [512, 128, 114]


@pytest.mark.parametrize("wrong", [{"num_times": 0}, {"grid": "right"}, {"levels": "some"}])
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossConfig(**wrong)
