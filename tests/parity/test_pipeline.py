"""Compares complete pipelines: diffusers loads our exports and generates the same images.

Every stage is compared: token ids, the outputs of text encoders and autoencoder, the transformer's
first inputs, the noise levels, the final latents, and the image.
"""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kontext_jax import flow, sample
from kontext_jax.convert import convert
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.geometry import KONTEXT_SIZES, Size, fit, nearest_size, size_of
from kontext_jax.loading import locations, models
from kontext_jax.models.autoencoder import pack_latents, to_pixels, unpack_latents
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sampler import sample as integrate
from kontext_jax.sampling.generator import Generator, with_room
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Tokens, unprompted
from kontext_jax.weights.export import write_diffusers
from kontext_jax.weights.networks import NETWORKS

REASON = "needs the convert extra: pip install -e '.[convert]'"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from diffusers import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
)
from diffusers.pipelines.flux import (  # noqa: E402
    pipeline_flux_img2img,
    pipeline_flux_kontext,
)

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow

SEED = 3
SIZES = ((32, 24), (24, 32), (40, 16))
RECORD = {
    "geometry": {"sizes": SIZES, "pixels_per_token": 8},
    "text": {"max_tokens": 24, "pad": True},
}


@pytest.fixture(scope="module")
def recorded(pipeline_folder, tmp_path_factory):
    """A pipeline whose record declares small images, converted through every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    shutil.copytree(pipeline_folder, folder / "recorded")
    shutil.rmtree(folder / "recorded" / "transformer")
    transformer = locations.open_network(pipeline_folder, "transformer")
    write_diffusers(transformer, folder / "recorded" / "transformer", RECORD)
    convert(folder / "recorded", folder / "bfl", "bfl")
    convert(folder / "bfl", folder / "orbax", "orbax")
    convert(folder / "orbax", folder / "diffusers", "diffusers")
    return folder / "diffusers"


def open_pipeline(folder) -> FluxKontextPipeline:
    pipe = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def complaints(caplog):
    """A function that returns the warnings and errors that the two libraries logged."""
    for library in (diffusers, transformers):
        library.utils.logging.enable_propagation()
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for library in (diffusers, transformers):
        library.utils.logging.disable_propagation()


@pytest.mark.parametrize("through", ["diffusers alone", "every layout"])
def test_diffusers_loads_an_exported_pipeline(
    pipeline_folder, recorded, tmp_path, complaints, through
):
    folder = recorded
    if through == "diffusers alone":
        folder = tmp_path / "out"
        convert(pipeline_folder, folder, "diffusers")
    pipe = open_pipeline(folder)
    for network in NETWORKS.values():
        component = getattr(pipe, network.folder)
        assert type(component).__name__ == network.class_name
        _, report = type(component).from_pretrained(
            folder / network.folder, local_files_only=True, output_loading_info=True
        )
        assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(report)
        assert not any(report.values()), report
    assert pipe.scheduler.config.use_dynamic_shifting
    assert not complaints()


class GeneratedBatch(NamedTuple):
    """The intermediate results of one side; ``text_ids`` to ``pooled`` have one row per prompt.

    ``sequence`` is the transformer's first input: noise, then contexts.
    """

    text_ids: np.ndarray
    clip_ids: np.ndarray
    text: np.ndarray
    pooled: np.ndarray
    sequence: np.ndarray
    positions: np.ndarray
    times: np.ndarray
    latents: np.ndarray
    image: np.ndarray


def generate_ours(
    folder,
    contexts: Sequence[np.ndarray],
    sampler: SamplerConfig,
    size: Size | None,
    init: np.ndarray | None = None,
) -> GeneratedBatch:
    """Generates an image with the functions that `sample.generate` calls."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = models.load_model(folder, mesh, dtype="float32")
    example = sample._example(PROMPT, contexts, init, size, model.data)
    data = dataclasses.replace(model.data, packing=PackingConfig(max_examples=1))
    data = with_room(data, [example])
    generator = Generator([example], data, model.objective, sampler, mesh, SEED)

    (first,) = generator._batches
    batches = [first] if first.negative is None else [first, unprompted(first)]
    is_target, key = first.is_target[0], jax.random.key(SEED)
    latents = generator._sample(model.networks, first)
    keys = flow.example_keys(key, jnp.asarray(first.example_ids))
    noise = flow.token_noise(
        keys, jnp.asarray(first.segments), jnp.asarray(first.offsets), latents.shape[-1]
    )
    encode_text = jax.jit(model.objective.encode_text)
    text, pooled = zip(*(encode_text(model.networks, batch) for batch in batches), strict=True)
    times = flow.schedule(sampler.num_steps, int(is_target.sum()), model.objective.time)
    return GeneratedBatch(
        text_ids=np.concatenate([batch.text_ids for batch in batches]),
        clip_ids=np.concatenate([batch.clip_ids[:, 0] for batch in batches]),
        text=np.concatenate(text),
        pooled=np.concatenate(pooled)[:, 0],
        sequence=np.where(is_target[:, None], noise[0], latents[0]),
        positions=first.positions[0],
        times=np.asarray(times),
        latents=latents[0, is_target],
        image=generator(model.networks)[0],
    )


PROMPT = "make it red, and then some more of it"


def generate_theirs(pipe, width_and_height: Size, **settings: Any) -> GeneratedBatch:
    """Generates an image with a pipeline of diffusers, and records its networks' inputs."""
    ids, encoder_ids, calls, steps = [], [], [], []
    hooks = [
        pipe.text_encoder.register_forward_pre_hook(lambda _, args: ids.append(args[0])),
        pipe.text_encoder_2.register_forward_pre_hook(lambda _, args: encoder_ids.append(args[0])),
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
        ),
    ]
    width, height = width_and_height
    image = pipe(
        prompt=PROMPT,
        width=width,
        height=height,
        output_type="pil",
        callback_on_step_end=lambda _, i, t, state: steps.append(state["latents"]) or {},
        **settings,
    ).images[0]
    for hook in hooks:
        hook.remove()
    prompts = len(ids)
    assert not calls[0]["txt_ids"].any()
    return GeneratedBatch(
        text_ids=torch.cat(encoder_ids).numpy(),
        clip_ids=torch.cat(ids).numpy(),
        text=torch.cat([call["encoder_hidden_states"] for call in calls[:prompts]]).numpy(),
        pooled=torch.cat([call["pooled_projections"] for call in calls[:prompts]]).numpy(),
        sequence=calls[0]["hidden_states"][0].numpy(),
        positions=calls[0]["img_ids"].numpy(),
        times=np.append([call["timestep"][0].numpy() for call in calls[::prompts]], 0.0),
        latents=steps[-1][0].numpy(),
        image=np.asarray(image),
    )


TOLERANCES = {"text": 1e-4, "pooled": 2e-5, "sequence": 2e-5, "times": 1e-6, "latents": 2e-4}
"""Absolute tolerances of results that are not integers."""


def check_same(actual: GeneratedBatch, expected: GeneratedBatch) -> None:
    for name, array in expected._asdict().items():
        if name in TOLERANCES:
            assert array.std() > 0.1, name
            tolerance = TOLERANCES[name]
            np.testing.assert_allclose(getattr(actual, name), array, atol=tolerance, err_msg=name)
        elif name != "image":
            np.testing.assert_array_equal(getattr(actual, name), array, err_msg=name)
    difference = actual.image.astype(int) - expected.image
    assert expected.image.std() > 10
    assert np.abs(difference).max() <= 1 and np.sqrt(np.mean(difference**2)) < 0.1


def random_image(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("context", "size", "cfg_scale"),
    [(None, (24, 32), 1.0), ((40, 16), (32, 24), 1.0), ((45, 19), None, 3.0)],
    ids=["text to image", "a context of another size", "a context to resize, true guidance"],
)
def test_same_image(pipeline_folder, recorded, monkeypatch, context, size, cfg_scale):
    """Without a record, prompts have FLUX's 512 tokens."""
    folder = recorded if context else pipeline_folder
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
    images = [random_image(*context)] if context else []
    sampler = SamplerConfig(num_steps=4, guidance=2.5, cfg_scale=cfg_scale)
    actual = generate_ours(folder, images, sampler, size)
    target = size_of(actual.image)
    assert target == (size or (40, 16))
    noise = actual.sequence[: len(actual.latents)]
    expected = generate_theirs(
        open_pipeline(folder),
        target,
        image=Image.fromarray(images[0]) if images else None,
        max_area=target[0] * target[1],
        _auto_resize=context not in SIZES,
        latents=torch.from_numpy(noise)[None],
        guidance_scale=sampler.guidance,
        true_cfg_scale=cfg_scale,
        negative_prompt="",
        num_inference_steps=sampler.num_steps,
        max_sequence_length=actual.text_ids.shape[1],
    )
    assert actual.text_ids.shape[1] == (24 if context else 512)
    check_same(actual, expected)


class Stop(Exception):
    """Stops a pipeline after the call of interest."""


@pytest.fixture(scope="module")
def bare_pipeline() -> FluxKontextPipeline:
    """A pipeline with FLUX's 16 pixels per token and only what preprocessing an image needs."""
    absent = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxKontextPipeline(**dict.fromkeys(absent), transformer=theirs.transformer())


def prepared(pipe: FluxKontextPipeline, image: Image.Image, monkeypatch, method: str):
    """Runs a pipeline until it calls ``method`` of its image processor.

    Returns:
      The call's arguments after the image, and its result.
    """
    call, results = getattr(pipe.image_processor, method), []

    def record(*args, **kwargs):
        results.extend([args[1:], call(*args, **kwargs)])
        raise Stop

    monkeypatch.setattr(pipe.image_processor, method, record)
    with pytest.raises(Stop):
        pipe(
            image=image,
            prompt_embeds=torch.zeros(1, 4, 40),
            pooled_prompt_embeds=torch.zeros(1, 28),
        )
    monkeypatch.undo()
    return results


@pytest.mark.parametrize(
    "size",
    [(1001, 1000), (1023, 767), (640, 1999), (333, 777), (2031, 1523), (1024, 1024)],
    ids=str,
)
def test_same_size_and_pixels_of_a_context(bare_pipeline, monkeypatch, size):
    image = random_image(*size)
    (height, width), pixels = prepared(
        bare_pipeline, Image.fromarray(image), monkeypatch, "preprocess"
    )
    fitted = fit(image, KONTEXT_SIZES)
    assert size_of(fitted) == nearest_size(*size, KONTEXT_SIZES) == (width, height)
    expected = pixels[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(to_pixels(jnp.asarray(fitted)), expected, rtol=0, atol=2e-7)


def test_same_size_of_any_context(bare_pipeline, monkeypatch):
    """For sides that are multiples of a token; diffusers rounds others down before the ratio."""
    sizes = np.random.default_rng(0).integers(2, 64, (100, 2)) * 16
    for width, height in sizes.tolist():
        image = Image.new("RGB", (width, height))
        chosen, _ = prepared(bare_pipeline, image, monkeypatch, "resize")
        assert nearest_size(width, height, KONTEXT_SIZES) == chosen[::-1], (width, height)


class Still(Flux):
    """A transformer with zero velocity, so that sampling returns its start."""

    def __init__(self):
        self.config = FluxConfig.tiny()

    def __call__(self, latents, *args, **kwargs):
        return jnp.zeros_like(latents)


STARTS = [(1, 1.0), (4, 0.5), (10, 0.9), (28, 0.6), (28, 0.3), (28, 1.0), (30, 1 / 3), (50, 0.7)]


@pytest.mark.parametrize(("num_steps", "strength"), STARTS)
def test_same_start_from_an_image(pipeline_folder, monkeypatch, num_steps, strength):
    """At 1024 x 1024; both sides have the same noise."""
    cells, config = (128, 128), SamplerConfig(num_steps=num_steps, strength=strength)
    image = np.random.default_rng(0).standard_normal((1, *cells, 16), np.float32)
    latents, key = pack_latents(jnp.asarray(image)), jax.random.key(SEED)
    shape = latents.shape[:2]
    tokens = Tokens(
        latents=latents,
        positions=jnp.zeros((*shape, 3), jnp.int32),
        segments=jnp.ones(shape, jnp.int32),
        is_target=jnp.ones(shape, bool),
        offsets=jnp.arange(shape[1])[None],
        text=jnp.zeros((1, 1, 1)),
        text_segments=jnp.ones((1, 1), jnp.int32),
        pooled=jnp.zeros((1, 1, 1)),
        example_ids=jnp.full((1, 1), 7),
    )
    start = integrate(Still(), tokens, key, config, flow.TimeConfig())
    keys = flow.example_keys(key, tokens.example_ids)
    noise = flow.token_noise(keys, tokens.segments, tokens.offsets, 64)

    # The pipeline's __call__ uses retrieve_timesteps, get_timesteps and prepare_latents like this.
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline_folder / "scheduler")
    pipe = FluxImg2ImgPipeline(scheduler=scheduler, **dict.fromkeys(absent))
    _replace_draws(monkeypatch, noise, cells)
    pipeline_flux_img2img.retrieve_timesteps(
        pipe.scheduler,
        num_steps,
        "cpu",
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps),
        mu=pipeline_flux_img2img.calculate_shift(4096),
    )
    timesteps, remaining = pipe.get_timesteps(num_steps, strength, "cpu")
    expected, _ = pipe.prepare_latents(
        torch.from_numpy(image).movedim(-1, 1),
        timesteps[:1],
        1,
        16,
        1024,
        1024,
        torch.float32,
        "cpu",
        None,
    )
    assert config.first_step == pipe.scheduler.begin_index == num_steps - remaining
    level = flow.schedule(num_steps, 4096, flow.TimeConfig())[config.first_step]
    np.testing.assert_allclose(level, pipe.scheduler.sigmas[pipe.scheduler.begin_index], atol=2e-7)
    np.testing.assert_allclose(start, expected, atol=1e-6)


def _replace_draws(monkeypatch, noise, cells: Size) -> None:
    """Makes FluxImg2ImgPipeline take this noise, and the mean of an image's latents."""
    tensor = torch.from_numpy(np.array(unpack_latents(jnp.asarray(noise), cells))).movedim(-1, 1)
    monkeypatch.setattr(pipeline_flux_img2img, "randn_tensor", lambda *args, **kwargs: tensor)
    retrieve = functools.partial(pipeline_flux_img2img.retrieve_latents, sample_mode="argmax")
    monkeypatch.setattr(pipeline_flux_img2img, "retrieve_latents", retrieve)


def test_same_image_from_an_initial_image(recorded, monkeypatch):
    size, init = (32, 24), random_image(32, 24)
    sampler = SamplerConfig(num_steps=6, strength=0.7, guidance=3.5)
    actual = generate_ours(recorded, [], sampler, size, init)
    _replace_draws(monkeypatch, actual.sequence[None], (6, 8))
    kontext = open_pipeline(recorded)
    components = {name: x for name, x in kontext.components.items() if x is not None}
    pipe = FluxImg2ImgPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    expected = generate_theirs(
        pipe,
        size,
        image=Image.fromarray(init),
        strength=sampler.strength,
        guidance_scale=sampler.guidance,
        num_inference_steps=sampler.num_steps,
        max_sequence_length=24,
    )
    # diffusers' first input is already mixed with the image.
    assert sampler.first_step == 1 and len(expected.times) == 6
    check_same(actual._replace(sequence=expected.sequence, times=actual.times[1:]), expected)


@pytest.mark.parametrize("max_tokens", [24, 512])
def test_same_token_ids(recorded, max_tokens):
    pipe, folder = open_pipeline(recorded), recorded
    tokenizer = Tokenizer(
        TextConfig(
            tokenizer=str(folder / "tokenizer_2"),
            clip_tokenizer=str(folder / "tokenizer"),
            max_tokens=max_tokens,
            pad=True,
        )
    )
    recorded_ids: dict[str, list[np.ndarray]] = {"text_encoder": [], "text_encoder_2": []}
    for name, ids in recorded_ids.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda _, args, ids=ids: ids.append(args[0][0].numpy())
        )
    too_long = "make it red " * 200
    for prompt in ("", " ", "make it red", "Make  it\nRED, «naïve» 赤 🟥!", too_long):
        pipe.encode_prompt(prompt, max_sequence_length=max_tokens)
        np.testing.assert_array_equal(tokenizer(prompt), recorded_ids["text_encoder_2"][-1])
        np.testing.assert_array_equal(tokenizer.clip(prompt), recorded_ids["text_encoder"][-1])
    assert tokenizer(too_long)[-1] == 1 and tokenizer.clip(too_long)[-1] == 519
