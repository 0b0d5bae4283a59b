"""Prompts to token ids, the way FLUX's T5 and CLIP want them: truncated, with their ends."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kontext_jax.settings import Settings


@dataclass(kw_only=True, unsafe_hash=True)
class TextConfig(Settings):
    """How prompts become token ids.

    FLUX itself: the folders of its two tokenizers, ``max_tokens=512`` and ``pad=True``.

    Attributes:
      tokenizer: "byt5" for bytes, which needs no files, or the folder of a transformers tokenizer.
      max_tokens: longer prompts are truncated to this, the end-of-text token included.
      pad: every prompt takes ``max_tokens``, and pads are attended to: what FLUX was trained with.
        Otherwise they are masked: a prompt takes as many tokens as it has.
      clip_tokenizer: the folder of CLIP's tokenizer, or empty where no network reads CLIP's ids.
      clip_max_tokens: every prompt is truncated and padded to this by CLIP's tokenizer.
    """

    tokenizer: str = "byt5"
    max_tokens: int = 512
    pad: bool = False
    clip_tokenizer: str = ""
    clip_max_tokens: int = 77

    @property
    def clip_length(self) -> int:
        """CLIP ids of a prompt: Q of the shape legend."""
        return self.clip_max_tokens if self.clip_tokenizer else 0

    def lengths(self) -> dict[str, int | bool]:
        """The settings that decide how much of a prompt a network reads."""
        return {name: getattr(self, name) for name in ("max_tokens", "clip_max_tokens", "pad")}


class Tokenizer:
    """Token ids of prompts, and how many there will be, known before the prompt is read."""

    def __init__(self, config: TextConfig):
        """Loads the tokenizers; never from the network.

        Raises:
          FileNotFoundError: a folder that ``config`` names is not there.
        """
        # Imported here, for it is slow; it would also advise to install PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer, ByT5Tokenizer

        def load(setting: str, otherwise: str):
            folder = getattr(config, setting)
            if not Path(folder).is_dir():
                raise FileNotFoundError(
                    f"No tokenizer folder at {folder!r}: set text.{setting} to {otherwise!r} or "
                    "to a folder that transformers' AutoTokenizer can load."
                )
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)

        self.config = config
        is_bytes = config.tokenizer == "byt5"
        self._tokenizer = ByT5Tokenizer() if is_bytes else load("tokenizer", "byt5")
        self._clip_tokenizer = load("clip_tokenizer", "") if config.clip_tokenizer else None

    def __call__(self, prompt: str) -> Int[np.ndarray, " l"]:
        """Token ids of ``prompt``, the end-of-text token included."""
        ids = self._tokenizer(
            prompt,
            truncation=True,
            max_length=self.config.max_tokens,
            padding="max_length" if self.config.pad else False,
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def clip(self, prompt: str) -> Int[np.ndarray, " q"]:
        """CLIP's ids of ``prompt``, both ends and pads included; none without its tokenizer."""
        if self._clip_tokenizer is None:
            return np.zeros(0, np.int32)
        ids = self._clip_tokenizer(
            prompt,
            truncation=True,
            max_length=self.config.clip_max_tokens,
            padding="max_length",
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def reserve(self, prompt_bytes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Places to keep for prompts of so many UTF-8 bytes: exact for bytes, else the most."""
        if self.config.pad or self.config.tokenizer != "byt5":
            return np.full_like(prompt_bytes, self.config.max_tokens)
        return np.minimum(prompt_bytes + 1, self.config.max_tokens)
