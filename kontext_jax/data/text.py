"""Tokenises prompts for FLUX's T5 and CLIP: truncated, with start and end tokens."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from kontext_jax.settings import Settings


@dataclass(kw_only=True, unsafe_hash=True)
class TextConfig(Settings):
    """Settings of the tokenizers.

    FLUX uses the folders of its two tokenizers, ``max_tokens=512`` and ``pad=True``.

    Attributes:
      tokenizer: "byt5" for bytes, which needs no files, or the folder of a transformers tokenizer.
      max_tokens: longest prompt, including the end-of-text token; longer ones are truncated.
      pad: whether to pad every prompt to ``max_tokens`` and attend to the padding, as FLUX was
        trained. Otherwise a prompt takes only its own tokens.
      clip_tokenizer: folder of CLIP's tokenizer, or empty if no network reads CLIP's ids.
      clip_max_tokens: length that CLIP's tokenizer truncates and pads every prompt to.
    """

    tokenizer: str = "byt5"
    max_tokens: int = 512
    pad: bool = False
    clip_tokenizer: str = ""
    clip_max_tokens: int = 77

    @property
    def clip_length(self) -> int:
        """Number of CLIP ids of a prompt: Q of the shape legend."""
        return self.clip_max_tokens if self.clip_tokenizer else 0

    def lengths(self) -> dict[str, int | bool]:
        """The settings that determine how much of a prompt networks read."""
        return {name: getattr(self, name) for name in ("max_tokens", "clip_max_tokens", "pad")}


class Tokenizer:
    """Tokenises prompts, and bounds their lengths before they are read."""

    def __init__(self, config: TextConfig):
        """Loads the tokenizers from local folders.

        Raises:
          FileNotFoundError: a folder in ``config`` does not exist.
        """
        # Imported here because it is slow. Without the variable it advises installing PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer, ByT5Tokenizer

        def load(setting: str, default: str):
            folder = getattr(config, setting)
            if not Path(folder).is_dir():
                raise FileNotFoundError(
                    f"No tokenizer folder at {folder!r}: set text.{setting} to {default!r} or "
                    "to a folder that transformers' AutoTokenizer can load."
                )
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)

        self.config = config
        is_bytes = config.tokenizer == "byt5"
        self._tokenizer = ByT5Tokenizer() if is_bytes else load("tokenizer", "byt5")
        self._clip_tokenizer = load("clip_tokenizer", "") if config.clip_tokenizer else None

    def __call__(self, prompt: str) -> Int[np.ndarray, " l"]:
        """Token ids of ``prompt``, including the end-of-text token."""
        ids = self._tokenizer(
            prompt,
            truncation=True,
            max_length=self.config.max_tokens,
            padding="max_length" if self.config.pad else False,
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def clip(self, prompt: str) -> Int[np.ndarray, " q"]:
        """CLIP ids of ``prompt``, including start, end and padding; empty without CLIP."""
        if self._clip_tokenizer is None:
            return np.zeros(0, np.int32)
        ids = self._clip_tokenizer(
            prompt,
            truncation=True,
            max_length=self.config.clip_max_tokens,
            padding="max_length",
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def max_lengths(self, prompt_bytes: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
        """Upper bounds of token counts, from prompt lengths in UTF-8 bytes; exact for bytes."""
        if self.config.pad or self.config.tokenizer != "byt5":
            return np.full_like(prompt_bytes, self.config.max_tokens)
        return np.minimum(prompt_bytes + 1, self.config.max_tokens)
