"""The parts of a pipeline's folder beside its networks: scheduler, tokenizers and index."""

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
"""Names of the single files in a folder of several networks in Black Forest Labs' layout."""

TOKENIZERS = {"text_encoder": "tokenizer_2", "clip": "tokenizer"}
"""Folders of the tokenizers, by text encoder."""


def write_scheduler(folder: Path, time: TimeConfig) -> None:
    """Writes diffusers' ``scheduler/scheduler_config.json`` for a schedule of noise levels."""
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


def read_scheduler(folder: Path) -> TimeConfig:
    """Returns the schedule of a pipeline's scheduler, or FLUX's if it has no scheduler.

    Raises:
      WeightsError: the scheduler is not supported.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return TimeConfig()
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}).") from error
    dynamic, shift = values.get("use_dynamic_shifting", False), values.get("shift", 1.0)
    if values.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or (
        not dynamic and shift != 1.0
    ):
        raise WeightsError(
            f"{path} is a {values.get('_class_name')} with a fixed shift of {shift}; supported is "
            "FlowMatchEulerDiscreteScheduler with a shift by resolution or none."
        )
    return TimeConfig(
        shift="resolution" if dynamic else "none",
        base_tokens=values.get("base_image_seq_len", 256),
        max_tokens=values.get("max_image_seq_len", 4096),
        base_shift=values.get("base_shift", 0.5),
        max_shift=values.get("max_shift", 1.15),
    )


def write_tokenizer(source: str, folder: Path) -> None:
    """Copies a tokenizer's folder, or writes ByT5's if ``source`` is "byt5".

    Raises:
      FileNotFoundError: the folder does not exist.
    """
    if source == "byt5":
        # transformers is slow to import, and would advise to install PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import ByT5Tokenizer

        ByT5Tokenizer().save_pretrained(folder)
        return
    if not Path(source).is_dir():
        raise FileNotFoundError(f"The tokenizer folder {source!r} does not exist.")
    shutil.copytree(source, folder)


def write_index(folder: Path, networks: Iterable[str]) -> None:
    """Writes ``model_index.json`` of a FluxKontextPipeline; networks it lacks are null.

    Args:
      folder: folder of the pipeline, with its tokenizers.
      networks: names of the networks in the folder.
    """
    networks = set(networks)
    index: dict[str, Any] = {
        "_class_name": "FluxKontextPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for network in NETWORKS.values():
        component = [network.library, network.class_name]
        index[network.folder] = component if network.name in networks else [None, None]
    for name, tokenizer in TOKENIZERS.items():
        index[tokenizer] = [None, None]
        if name in networks:
            index[tokenizer] = ["transformers", _tokenizer_class(folder / tokenizer)]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_class(folder: Path) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return config["tokenizer_class"]
