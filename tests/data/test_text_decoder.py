"""The text of tokens in a worker equals that of transformers, for both kinds of tokenizer, and others are refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from digits.checkpoint import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from megatron_vppo.data.text_decoder import TextDecoder, describe_tokenizer

CORPUS = ["the answer is 42, so \\boxed{42}. 三角形的面积 naïve 😀 don't"] * 2


@pytest.fixture
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, and added tokens that are special, ordinary, and of several words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_tokens([AddedToken("<think>"), AddedToken(" two words ", lstrip=True), AddedToken("<工具>")])
    made.add_tokens([AddedToken("<|image_pad|>", special=True)], special_tokens=True)
    return made


def tokens_of(tokenizer: Any) -> list[list[int]]:
    """Makes rows of text, of every token alone, and of random tokens, most of which are no text at all."""
    draw = random.Random(0)
    every = list(range(len(tokenizer)))
    rows = [tokenizer(text)["input_ids"] for text in (*CORPUS, "a <think> two words </think>", "")]
    rows += [[token] for token in every]
    rows += [[draw.choice(every) for _ in range(draw.randrange(1, 40))] for _ in range(500)]
    return [*rows, [10**6, every[0]]]  # vLLM can sample ids that the tokenizer does not have


def check(tokenizer: Any) -> None:
    decoder = TextDecoder(describe_tokenizer(tokenizer))
    for row in tokens_of(tokenizer):
        assert decoder.decode(row) == tokenizer.decode(tuple(row), skip_special_tokens=True), row


def test_byte_level_text_is_that_of_transformers(byte_level: PreTrainedTokenizerFast) -> None:
    assert len(json.loads(byte_level.backend_tokenizer.to_str())["model"]["merges"]) > 20
    check(byte_level)
    byte_level.clean_up_tokenization_spaces = True  # transformers passes over it for BPE
    check(byte_level)


def test_text_of_whole_words_is_that_of_transformers() -> None:
    check(make_tokenizer())


def test_the_processor_of_the_data_tests(processor: Any) -> None:
    check(processor.tokenizer)


def test_a_tokenizer_that_changes_its_texts_afterwards_is_refused(byte_level: PreTrainedTokenizerFast) -> None:
    cleaning = make_tokenizer()
    cleaning.clean_up_tokenization_spaces = True
    byte_level.clean_up_tokenization_spaces = True
    byte_level.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    for tokenizer in (cleaning, byte_level):
        with pytest.raises(ValueError, match="takes blanks out of texts; set clean_up_tokenization_spaces to false"):
            describe_tokenizer(tokenizer)


def test_a_tokenizer_with_a_way_of_its_own_is_refused() -> None:
    class Own(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **options: Any) -> str:
            return "mine"

    own = Own(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer Own decodes in a way of its own; use one with a tokenizer\.json"):
        describe_tokenizer(own)
