"""A whole CLIP against transformers', and what it is shown against torchvision and transformers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kontext_jax.metrics.similarity import cosine
from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.clip_vision import MEAN, STD, middle_square
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
VIT_B32 = dict(text_config=TEXT)  # all else is transformers' default, which files leave out

PROMPTS = ["make it red", "", "a photograph of a small zebra", "make " * 100]


def theirs(sizes: dict) -> "transformers.CLIPModel":
    network = transformers.CLIPModel(transformers.CLIPConfig(**sizes)).eval()
    with torch.no_grad():
        for name, param in network.named_parameters():
            param.copy_(torch.from_numpy(np.asarray(draws.weight(name, param.shape))))
    return network


def needed(module: str):
    """An optional module. torchvision's build must be that of torch, or it fails strangely."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs {module} of a build that fits torch's: {error}")


def vectors(out) -> np.ndarray:
    """transformers 5 gives the projected vectors as ``pooler_output``; 4 alone."""
    return getattr(out, "pooler_output", out).numpy()


def saved(sizes, tokenizer_folder, folder):
    """A network and its tokenizer, as both are in the folder."""
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
    seen = (np.stack(images) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = torch.from_numpy(seen).permute(0, 3, 1, 2).float()
        pictures = vectors(network.get_image_features(pixel_values=pixels))
        texts = vectors(network.get_text_features(**tokens))
    for ours, wanted in ((clip.image(images, mesh), pictures), (clip.text(PROMPTS, mesh), texts)):
        assert ours.shape == wanted.shape and wanted.std() > 0.2
        assert np.abs(wanted - wanted[0]).max(axis=1)[1:].min() > 0.01  # they are told apart
        np.testing.assert_allclose(ours, wanted, atol=5e-6 * np.abs(wanted).max())


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """Waves of a few pixels and more, with edges: uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = np.zeros((height, width, 3))
    for wave, (fx, fy) in enumerate(rng.uniform(-0.2, 0.2, (12, 2))):
        image[:, :, wave % 3] += np.sin(2 * np.pi * (fx * x + fy * y) + wave)
    image[height // 3 : height // 2, width // 4 : width // 2] += 2
    return (127.5 + 40 * image).clip(0, 255).astype(np.uint8)


def test_vectors_of_pictures_and_texts(flux_tokenizers, tmp_path):
    """Within 5e-6 of the largest entry."""
    compare(TINY, flux_tokenizers / "tokenizer", tmp_path)


@pytest.mark.slow
def test_vectors_at_full_size(flux_tokenizers, tmp_path):
    """ViT-B/32's sizes, but for the words of its vocabulary."""
    compare(VIT_B32, flux_tokenizers / "tokenizer", tmp_path)


def ours_sees(image: np.ndarray) -> np.ndarray:
    """In units of 8-bit colours, not rounded."""
    x = jax.jit(middle_square, static_argnums=1)(to_pixels(jnp.asarray(image[None])), 224)
    found = np.asarray(standardise(x, 224, MEAN, STD))[0]
    return (found * STD + MEAN) * 255


SIZES = [(224, 224), (512, 512), (300, 400), (401, 277), (200, 291)]
LEVELS = 1.6  # Pillow rounds twice to 8 bits, after rows and after columns; 0.4 on average


@pytest.mark.parametrize("size", [*SIZES, (180, 260), (260, 180)], ids=str)
def test_pictures_are_seen_as_openai_s_code_shows_them(size):
    """Resize and CenterCrop of torchvision on Pillow's images, within 1.6 of 255 levels."""
    image = smooth(*size, seed=0)
    transforms = needed("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    chain = transforms.Compose([transforms.Resize(224, bicubic), transforms.CenterCrop(224)])
    wanted = np.asarray(chain(Image.fromarray(image)), np.float64)
    error = np.abs(ours_sees(image) - wanted)
    assert error.max() < LEVELS and error.mean() < 0.5, (error.max(), error.mean())


@pytest.mark.parametrize("backend", ["CLIPImageProcessor", "CLIPImageProcessorPil"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_seen_as_transformers_shows_them(size, backend):
    """But not where the margin is 3 of 4 pixels: transformers then is a pixel off torchvision."""
    image = smooth(*size, seed=0)
    needed("torchvision")
    processor = getattr(transformers, backend)()
    wanted = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    wanted = (wanted.transpose(1, 2, 0) * STD + MEAN) * 255
    error = np.abs(ours_sees(image) - wanted)
    assert error.max() < LEVELS and error.mean() < 0.5, (error.max(), error.mean())


def test_torchmetrics_clip_score(flux_tokenizers, tmp_path):
    """100 times the cosine, and zero where that is negative; pictures are not resized."""
    score = needed("torchmetrics.functional.multimodal").clip_score
    network, tokenizer = saved(TINY, flux_tokenizers / "tokenizer", tmp_path)
    for name in ("get_image_features", "get_text_features"):  # it expects what transformers 4 gives
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
            found = float(score(tensor, prompt, lambda: (network, processor)))
        assert found == pytest.approx(max(100 * ours, 0), abs=1e-3)
