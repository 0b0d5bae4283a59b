"""Compares a full CLIP with transformers, and its image preprocessing with torchvision's too."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kontext_jax.metrics.similarity import cosine
from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.clip_vision import MEAN, STD, resize_and_crop
from kontext_jax.models.features import standardise
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.weights.clip_vision import load_clip
from tests.parity import draws

REASON = "needs the convert extra: pip install -e '.[convert]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

TEXT = dict(vocab_size=520, bos_token_id=518, eos_token_id=519, pad_token_id=519)
BLOCKS = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
TINY = dict(
    text_config=TEXT | BLOCKS,
    vision_config=BLOCKS | dict(image_size=28, patch_size=7),
    projection_dim=20,
)
VIT_B32 = dict(text_config=TEXT)  # everything else is transformers' default

PROMPTS = ["make it red", "", "a photograph of a small zebra", "make " * 100]


def theirs(sizes: dict) -> "transformers.CLIPModel":
    network = transformers.CLIPModel(transformers.CLIPConfig(**sizes)).eval()
    with torch.no_grad():
        for name, param in network.named_parameters():
            param.copy_(torch.from_numpy(np.asarray(draws.weight(name, param.shape))))
    return network


def import_or_skip(module: str):
    """Imports an optional module; torchvision may fail if its build does not fit torch's."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs {module} of a build that fits torch's: {error}")


def embeddings(out) -> np.ndarray:
    """Returns projected embeddings, which are ``pooler_output`` in transformers 5, ``out`` in 4."""
    return getattr(out, "pooler_output", out).numpy()


def saved(sizes, tokenizer_folder, folder):
    """Returns a network and its tokenizer, and saves both in the folder."""
    network = theirs(sizes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    for part in (network, tokenizer):
        part.save_pretrained(folder)
    return network, tokenizer


def compare(sizes, tokenizer_folder, folder):
    network, tokenizer = saved(sizes, tokenizer_folder, folder)
    mesh, side = make_mesh(MeshConfig(), jax.devices()[:1]), network.config.vision_config.image_size
    clip = load_clip(folder, mesh)
    images = [smooth(side, side, seed) for seed in range(3)]
    inputs = (np.stack(images) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = torch.from_numpy(inputs).permute(0, 3, 1, 2).float()
        of_images = embeddings(network.get_image_features(pixel_values=pixels))
        of_texts = embeddings(network.get_text_features(**tokens))
    for actual, expected in (
        (clip.image(images, mesh), of_images),
        (clip.text(PROMPTS, mesh), of_texts),
    ):
        assert actual.shape == expected.shape and expected.std() > 0.2
        assert np.abs(expected - expected[0]).max(axis=1)[1:].min() > 0.01  # inputs differ
        np.testing.assert_allclose(actual, expected, atol=5e-6 * np.abs(expected).max())


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """Returns a uint8 image of waves of a few pixels and more, with edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = np.zeros((height, width, 3))
    for wave, (fx, fy) in enumerate(rng.uniform(-0.2, 0.2, (12, 2))):
        image[:, :, wave % 3] += np.sin(2 * np.pi * (fx * x + fy * y) + wave)
    image[height // 3 : height // 2, width // 4 : width // 2] += 2
    return (127.5 + 40 * image).clip(0, 255).astype(np.uint8)


def test_embeddings_of_images_and_texts(flux_tokenizers, tmp_path):
    """Within 5e-6 of the largest entry."""
    compare(TINY, flux_tokenizers / "tokenizer", tmp_path)


@pytest.mark.slow
def test_embeddings_at_full_size(flux_tokenizers, tmp_path):
    """With ViT-B/32's sizes, except for the vocabulary."""
    compare(VIT_B32, flux_tokenizers / "tokenizer", tmp_path)


def preprocess(image: np.ndarray) -> np.ndarray:
    """Returns our network's input in units of 8-bit colours, not rounded."""
    x = jax.jit(resize_and_crop, static_argnums=1)(to_pixels(jnp.asarray(image[None])), 224)
    pixels = np.asarray(standardise(x, 224, MEAN, STD))[0]
    return (pixels * STD + MEAN) * 255


SIZES = [(224, 224), (512, 512), (300, 400), (401, 277), (200, 291)]
LEVELS = 1.6  # Pillow rounds to 8 bits twice, after rows and after columns; the mean is 0.4


@pytest.mark.parametrize("size", [*SIZES, (180, 260), (260, 180)], ids=str)
def test_preprocessing_matches_openai_s(size):
    """Resize and CenterCrop of torchvision on Pillow's images, within 1.6 of 255 levels."""
    image = smooth(*size, seed=0)
    transforms = import_or_skip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    chain = transforms.Compose([transforms.Resize(224, bicubic), transforms.CenterCrop(224)])
    expected = np.asarray(chain(Image.fromarray(image)), np.float64)
    error = np.abs(preprocess(image) - expected)
    assert error.max() < LEVELS and error.mean() < 0.5, (error.max(), error.mean())


@pytest.mark.parametrize("backend", ["CLIPImageProcessor", "CLIPImageProcessorPil"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocessing_matches_transformers(size, backend):
    """Except for margins of 3 modulo 4 pixels, where transformers is one pixel off torchvision."""
    image = smooth(*size, seed=0)
    import_or_skip("torchvision")
    processor = getattr(transformers, backend)()
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    expected = (expected.transpose(1, 2, 0) * STD + MEAN) * 255
    error = np.abs(preprocess(image) - expected)
    assert error.max() < LEVELS and error.mean() < 0.5, (error.max(), error.mean())


def test_torchmetrics_clip_score(flux_tokenizers, tmp_path):
    """The score is 100 times the cosine, clipped at zero; images are not resized."""
    score = import_or_skip("torchmetrics.functional.multimodal").clip_score
    network, tokenizer = saved(TINY, flux_tokenizers / "tokenizer", tmp_path)
    for name in ("get_image_features", "get_text_features"):  # it expects outputs of version 4
        method = getattr(network, name)
        setattr(network, name, lambda *args, method=method: method(*args).pooler_output)
    side = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**side), tokenizer)
    mesh, images = make_mesh(MeshConfig(), jax.devices()[:1]), [smooth(28, 28, i) for i in range(4)]
    clip, prompts = load_clip(tmp_path, mesh), PROMPTS[:3] + ["a zebra"]
    scores = cosine(clip.image(images, mesh), clip.text(prompts, mesh))
    assert scores.min() < -0.01 and scores.max() > 0.01
    for image, prompt, ours in zip(images, prompts, scores, strict=True):
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        with torch.no_grad():
            expected = float(score(tensor, prompt, lambda: (network, processor)))
        assert expected == pytest.approx(max(100 * ours, 0), abs=1e-3)
