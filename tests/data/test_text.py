"""Token ids, and upper bounds on their number."""

import numpy as np
import pytest
import tokenizers
import transformers

from kontext_jax.data.text import TextConfig, Tokenizer

PROMPTS = ["", "make it red", "größer, 大きい"]


def test_byte_ids_end_with_the_end_of_text_token():
    ids = Tokenizer(TextConfig())("aß")
    assert ids.dtype == np.int32
    assert ids.tolist() == [byte + 3 for byte in "aß".encode()] + [1]


@pytest.mark.parametrize("max_tokens", [6, 512])
@pytest.mark.parametrize("pad", [False, True])
def test_bounds_are_exact_for_bytes(max_tokens, pad):
    tokenizer = Tokenizer(TextConfig(max_tokens=max_tokens, pad=pad))
    bounds = tokenizer.max_lengths(np.array([len(prompt.encode()) for prompt in PROMPTS]))
    assert [len(tokenizer(prompt)) for prompt in PROMPTS] == bounds.tolist()
    assert max(bounds) <= max_tokens


def test_truncated_prompts_keep_the_end_of_text_token():
    ids = Tokenizer(TextConfig(max_tokens=4))("abcdef")
    assert ids.tolist() == [ord(letter) + 3 for letter in "abc"] + [1]


def test_padding_follows_the_end_of_text_token():
    ids = Tokenizer(TextConfig(max_tokens=5, pad=True))("ab")
    assert ids.tolist() == [ord("a") + 3, ord("b") + 3, 1, 0, 0]


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="No tokenizer folder at '/nowhere/t5'.*byt5"):
        Tokenizer(TextConfig(tokenizer="/nowhere/t5"))


@pytest.fixture
def folder(tmp_path) -> str:
    """A tokenizer like T5's: NFKC normalisation and a space before the first word."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁red", "a"]
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_transformers_tokenizer_is_loaded_from_its_folder(folder):
    assert Tokenizer(TextConfig(tokenizer=folder))("red a").tolist() == [4, 3, 5, 1]
    assert Tokenizer(TextConfig(tokenizer=folder, max_tokens=3))("red a").tolist() == [4, 3, 1]


@pytest.mark.parametrize("prompt", ["", "red", "a", "ﷺ"])
def test_bounds_hold_for_a_transformers_tokenizer(folder, prompt):
    """A lone "a" is two pieces, and the ligature is eighteen letters."""
    tokenizer = Tokenizer(TextConfig(tokenizer=folder))
    ids = tokenizer(prompt)
    assert len(ids) <= tokenizer.max_lengths(np.array([len(prompt.encode())]))[0]
    assert ids[-1] == 1 and (prompt != "a" or ids.tolist() == [3, 5, 1])


def flux_config(folder, **settings) -> TextConfig:
    names = dict(tokenizer=str(folder / "tokenizer_2"), clip_tokenizer=str(folder / "tokenizer"))
    return TextConfig(**(names | settings))


def test_the_two_tokenizers_of_flux(flux_tokenizers):
    tokenizer = Tokenizer(flux_config(flux_tokenizers, max_tokens=6, pad=True, clip_max_tokens=7))
    assert tokenizer("make it red").tolist() == [4, 5, 6, 1, 0, 0]
    assert tokenizer("").tolist() == [1, 0, 0, 0, 0, 0]
    ids = tokenizer.clip("Make it  red")
    assert ids.dtype == np.int32
    assert ids.tolist() == [518, 517, 514, 513, 519, 519, 519]
    assert tokenizer.clip("").tolist() == [518] + [519] * 6


def test_both_tokenizers_truncate_before_the_end_token(flux_tokenizers):
    tokenizer = Tokenizer(flux_config(flux_tokenizers, max_tokens=4, clip_max_tokens=5))
    assert tokenizer("make it red red red").tolist() == [4, 5, 6, 1]
    assert tokenizer.clip("make it red red red").tolist() == [518, 517, 514, 513, 519]


def test_there_are_77_clip_ids_by_default_and_none_without_clip(flux_tokenizers):
    with_clip = flux_config(flux_tokenizers)
    assert with_clip.clip_length == len(Tokenizer(with_clip).clip("red")) == 77
    assert TextConfig().clip_length == 0
    none = Tokenizer(TextConfig()).clip("red")
    assert none.shape == (0,) and none.dtype == np.int32


def test_a_missing_clip_folder_is_named():
    with pytest.raises(FileNotFoundError, match="'/nowhere/clip': set text.clip_tokenizer to ''"):
        Tokenizer(TextConfig(clip_tokenizer="/nowhere/clip"))
