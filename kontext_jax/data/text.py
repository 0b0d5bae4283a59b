"""Prompts to token ids, the way FLUX's T5 wants them: truncated, with the end-of-text token."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int


@dataclass(kw_only=True, unsafe_hash=True)
class TextConfig:
    """How prompts become token ids.

    Attributes:
      tokenizer: "byt5" for bytes, which needs no files, or the folder of a transformers tokenizer.
      max_tokens: longer prompts are truncated to this, the end-of-text token included.
      pad: every prompt takes ``max_tokens``, and pads are attended to: what FLUX was trained with.
    """

    tokenizer: str = "byt5"
    max_tokens: int = 512
    pad: bool = False


class Tokenizer:
    """Token ids of prompts, and how many there will be, known before the prompt is read."""

    def __init__(self, config: TextConfig):
        """Loads the tokenizer; never from the network.

        Raises:
          FileNotFoundError: ``config.tokenizer`` is no folder.
        """
        # Imported here, for it is slow; it would also advise to install PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer, ByT5Tokenizer

        self.config = config
        if config.tokenizer == "byt5":
            self._tokenizer = ByT5Tokenizer()
        elif Path(config.tokenizer).is_dir():
            self._tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, local_files_only=True)
        else:
            raise FileNotFoundError(
                f"No tokenizer folder at {config.tokenizer!r}: set text.tokenizer to 'byt5' or to "
                "a folder that transformers' AutoTokenizer can load."
            )

    def __call__(self, prompt: str) -> Int[np.ndarray, " l"]:
        """Token ids of ``prompt``, the end-of-text token included."""
        ids = self._tokenizer(
            prompt,
            truncation=True,
            max_length=self.config.max_tokens,
            padding="max_length" if self.config.pad else False,
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def reserve(self, prompt_bytes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Places to keep for prompts of so many UTF-8 bytes: exact for bytes, else the most."""
        if self.config.pad or self.config.tokenizer != "byt5":
            return np.full_like(prompt_bytes, self.config.max_tokens)
        return np.minimum(prompt_bytes + 1, self.config.max_tokens)
