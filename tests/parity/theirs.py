"""PyTorch's side of the comparison: networks of diffusers and transformers with drawn weights."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
)

from kontext_jax.weights import dino as dino_names
from tests.parity import draws


def drawn(network: torch.nn.Module, file_name: Callable[[str], str] = str) -> torch.nn.Module:
    """Sets a network's weights to those of `draws`.

    Args:
      network: the network.
      file_name: function from a parameter's name in memory to its name in files.
    """
    with torch.no_grad():
        for name, param in network.named_parameters():
            param.copy_(torch.from_numpy(draws.weight(file_name(name), param.shape)))
    return network.eval()


def transformer(**settings: Any) -> FluxTransformer2DModel:
    sizes = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=40,
        pooled_projection_dim=28,
        guidance_embeds=True,
        axes_dims_rope=(4, 8, 12),
    )
    return drawn(FluxTransformer2DModel(**(sizes | settings)))


def autoencoder(
    multiples: Sequence[int] = (1, 2, 4, 4),
    layers: int = 2,
    groups: int = 32,
    quant_conv: bool = False,
) -> AutoencoderKL:
    """Returns FLUX's autoencoder with a quarter of its width."""
    levels = len(multiples)
    return drawn(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(32 * multiple for multiple in multiples),
            layers_per_block=layers,
            latent_channels=6,
            norm_num_groups=groups,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=quant_conv,
            use_post_quant_conv=quant_conv,
        )
    )


def t5() -> T5EncoderModel:
    """Returns a T5 whose heads have another total width, 3 x 12, than the model, 32."""
    return drawn(
        T5EncoderModel(
            T5Config(
                vocab_size=200,
                d_model=32,
                d_kv=12,
                d_ff=48,
                num_layers=3,
                num_heads=3,
                feed_forward_proj="gated-gelu",
            )
        )
    )


def clip(eos_token_id: int) -> CLIPTextModel:
    return drawn(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100,
                hidden_size=32,
                intermediate_size=80,
                num_hidden_layers=3,
                num_attention_heads=4,
                bos_token_id=98,
                eos_token_id=eos_token_id,
            )
        )
    )


def dino() -> Dinov2Model:
    """Returns a DINOv2 with positions of 5 x 5 patches."""
    config = Dinov2Config(
        hidden_size=48,
        num_hidden_layers=5,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=70,
        use_mask_token=False,
    )
    return drawn(Dinov2Model(config), dino_names.canonical_name)


def save(network: torch.nn.Module, folder: Path, **kwargs: Any) -> Path:
    network.save_pretrained(folder, **kwargs)
    return folder


def _velocity(network: FluxTransformer2DModel, example: draws.Example) -> torch.Tensor:
    dtype = network.dtype
    batch = {
        "hidden_states": example.latents,
        "encoder_hidden_states": example.text,
        "pooled_projections": example.pooled,
        "timestep": example.t,
    }
    if network.config.guidance_embeds:
        batch["guidance"] = example.guidance
    out = network(
        **{name: torch.from_numpy(np.asarray(x)[None]).to(dtype) for name, x in batch.items()},
        img_ids=torch.from_numpy(example.positions).float(),
        txt_ids=torch.zeros(len(example.text), 3),
    )
    return out.sample[0, : len(example.velocity)]


def velocity(network: FluxTransformer2DModel, examples: Sequence[draws.Example]) -> np.ndarray:
    """Returns the velocity of the targets' tokens, computed one example at a time."""
    with torch.no_grad():
        return torch.cat([_velocity(network, x).float() for x in examples]).numpy()


def loss(network: FluxTransformer2DModel, examples: Sequence[draws.Example]) -> torch.Tensor:
    """Returns the mean squared error over the targets' tokens."""
    errors = [_velocity(network, x) - torch.from_numpy(x.velocity) for x in examples]
    return torch.cat(errors).square().mean()


def grads(
    network: FluxTransformer2DModel, examples: Sequence[draws.Example]
) -> dict[str, np.ndarray]:
    """Returns the gradient of `loss` by every parameter."""
    network.zero_grad()
    loss(network, examples).backward()
    return {name: param.grad.numpy() for name, param in network.named_parameters()}


def misrounded() -> np.ndarray:
    """Returns a mask of the sinusoids whose frequency PyTorch does not round to the nearest."""
    exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    nearest = np.exp(exponents.numpy().astype(np.float64)).astype(np.float32)
    return np.tile(torch.exp(exponents).numpy() != nearest, 2)


def encode(network: AutoencoderKL, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and log-variance of images; all arrays are NHWC."""
    with torch.no_grad():
        posterior = network.encode(_channels_first(images)).latent_dist
    return _channels_last(posterior.mean), _channels_last(posterior.logvar)


def decode(network: AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    """Returns the images of scaled latents, as in FLUX's pipelines; all arrays are NHWC."""
    z = _channels_first(latents) / network.config.scaling_factor + network.config.shift_factor
    with torch.no_grad():
        return _channels_last(network.decode(z).sample)


def _channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def _channels_last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


def read(network: T5EncoderModel, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns T5's embedding of every token; without a mask, padding is read, as in FLUX."""
    mask = None if mask is None else torch.from_numpy(mask).long()
    with torch.no_grad():
        return network(torch.from_numpy(ids).long(), attention_mask=mask)[0].numpy()


def pooled(network: CLIPTextModel, ids: np.ndarray) -> np.ndarray:
    """Returns CLIP's pooled embedding of every prompt."""
    with torch.no_grad():
        return network(torch.from_numpy(ids).long()).pooler_output.numpy()


def features(
    network: Dinov2Model, images: torch.Tensor, taps: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns DINOv2's maps of patches after the blocks ``taps`` (NHWC), and its pooled output.

    ``images`` are NHWC, in [-1, 1]. Gradients flow from the outputs to the images.
    """
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    outputs = {}
    for i in taps:
        layer = network.encoder.layer[i]
        layer.register_forward_hook(lambda *args, i=i: outputs.update({i: args[-1]}))
    pooled = network(((images + 1) / 2 - mean).div(std).permute(0, 3, 1, 2)).pooler_output
    cells = images.shape[1] // network.config.patch_size
    return [outputs[i][:, 1:].unflatten(1, (cells, cells)) for i in taps], pooled


def times(num_steps: int, num_tokens: int | None) -> np.ndarray:
    """Returns the noise levels of FLUX's schedule; None tokens for [schnell]'s, without shift."""
    shifted = num_tokens is not None
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if shifted else 1.0,
        use_dynamic_shifting=shifted,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    mu = calculate_shift(num_tokens) if shifted else None
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy()
