"""What a pipeline's folder holds beside its networks: scheduler, tokenizers, and the index."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kontext_jax.flow import TimeConfig
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.networks import NETWORKS

DIFFUSERS_VERSION = "0.35.0"  # the first with Kontext

BFL_FILES = {"transformer": "transformer.safetensors", "autoencoder": "ae.safetensors"}
"""What the single files are called in a folder of several networks."""

TOKENIZERS = {"text_encoder": "tokenizer_2", "clip": "tokenizer"}
"""Folders of the text encoders' tokenizers."""


def write_scheduler(folder: Path, time: TimeConfig) -> None:
    """diffusers' ``scheduler/scheduler_config.json`` of the same times."""
    shifted = time.shift == "resolution"
    values = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": shifted,
        "shift": 3.0 if shifted else 1.0,  # unused where the shift is dynamic
        "base_shift": time.base_shift,
        "max_shift": time.max_shift,
        "base_image_seq_len": time.base_tokens,
        "max_image_seq_len": time.max_tokens,
    }
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def time_of(folder: Path) -> TimeConfig:
    """The times of a pipeline's scheduler; FLUX's own where there is none.

    Raises:
      WeightsError: the scheduler is another.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return TimeConfig()
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}).") from error
    dynamic, shift = values.get("use_dynamic_shifting", False), values.get("shift", 1.0)
    if values.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or (
        not dynamic and shift != 1.0
    ):
        raise WeightsError(
            f"{path} is a {values.get('_class_name')} with a fixed shift of {shift}; FLUX has a "
            "FlowMatchEulerDiscreteScheduler, shifted by the resolution or not at all."
        )
    return TimeConfig(
        shift="resolution" if dynamic else "none",
        base_tokens=values.get("base_image_seq_len", 256),
        max_tokens=values.get("max_image_seq_len", 4096),
        base_shift=values.get("base_shift", 0.5),
        max_shift=values.get("max_shift", 1.15),
    )


def write_tokenizer(source: str, folder: Path) -> None:
    """Copies a tokenizer's folder; "byt5" is written out.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if source == "byt5":
        # Imported here, for it is slow; it would also advise to install PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import ByT5Tokenizer

        ByT5Tokenizer().save_pretrained(folder)
        return
    if not Path(source).is_dir():
        raise FileNotFoundError(f"There is no tokenizer folder {source!r} to copy.")
    shutil.copytree(source, folder)


def write_index(folder: Path, networks: Iterable[str]) -> None:
    """``model_index.json`` of a FluxKontextPipeline; networks that are not there are null."""
    there = set(networks)
    index: dict[str, Any] = {
        "_class_name": "FluxKontextPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for network in NETWORKS.values():
        known = [network.library, network.class_name]
        index[network.folder] = known if network.name in there else [None, None]
    for name, tokenizer in TOKENIZERS.items():
        index[tokenizer] = [None, None]
        if name in there:
            index[tokenizer] = ["transformers", _tokenizer_class(folder / tokenizer)]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_class(folder: Path) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return config["tokenizer_class"]
