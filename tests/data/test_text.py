import numpy as np
import pytest

from kontext_jax.data.text import TextConfig, Tokenizer

PROMPTS = ["", "make it red", "größer, 大きい"]


def test_bytes_and_the_end_of_text_token():
    ids = Tokenizer(TextConfig())("aß")
    assert ids.dtype == np.int32
    assert ids.tolist() == [byte + 3 for byte in "aß".encode()] + [1]


@pytest.mark.parametrize("max_tokens", [6, 512])
@pytest.mark.parametrize("pad", [False, True])
def test_as_many_tokens_as_were_reserved(max_tokens, pad):
    tokenizer = Tokenizer(TextConfig(max_tokens=max_tokens, pad=pad))
    reserved = tokenizer.reserve(np.array([len(prompt.encode()) for prompt in PROMPTS]))
    assert [len(tokenizer(prompt)) for prompt in PROMPTS] == reserved.tolist()
    assert max(reserved) <= max_tokens


def test_long_prompts_are_cut_before_the_end_of_text_token():
    ids = Tokenizer(TextConfig(max_tokens=4))("abcdef")
    assert ids.tolist() == [ord(letter) + 3 for letter in "abc"] + [1]


def test_pads_follow_the_end_of_text_token():
    ids = Tokenizer(TextConfig(max_tokens=5, pad=True))("ab")
    assert ids.tolist() == [ord("a") + 3, ord("b") + 3, 1, 0, 0]


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="No tokenizer folder at '/nowhere/t5'.*byt5"):
        Tokenizer(TextConfig(tokenizer="/nowhere/t5"))
