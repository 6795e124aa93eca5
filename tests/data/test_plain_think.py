"""The think tags in plain pieces: for the prompt, in responses, in the exported folder, and by whoever loads that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

from megatron_vppo.data.plain_think import save_plain_tokenizer, think_token_ids, with_plain_think
from megatron_vppo.data.text_decoder import TextDecoder, describe_tokenizer
from tests.data.conftest import SPECIAL_TOKENS
from tests.data.test_prompts import builder

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "i")]
VOCAB = {token: number for number, token in enumerate([*ALPHABET, *map("".join, MERGES)])}
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""In the order of Qwen3's, none of which is a special token."""
TEXT = "Within <think> </think> tags.</think>"


def tokenizer_of(kind: str, *added: str) -> Any:
    if kind == "qwen2":
        made = Qwen2Tokenizer(vocab=VOCAB, merges=MERGES, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    else:
        inner = Tokenizer(models.BPE(vocab=VOCAB, merges=MERGES))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return made


def processor_with(processor: Any, tokenizer: Any) -> Any:
    changed = copy.copy(processor)
    changed.tokenizer = tokenizer
    changed.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    changed.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return changed


def in_pieces(tag: str) -> list[int]:
    """Worked out by hand: the merges make one token of "thi", all else is single bytes."""
    pieces = [*tag.partition("thi")[0], "thi", *tag.partition("thi")[2]]
    return [VOCAB[piece] for piece in pieces]


@pytest.fixture(params=["backend", "qwen2"])
def released(request, processor) -> Any:
    return processor_with(processor, tokenizer_of(request.param, *ADDED))


def test_the_tags_are_encoded_in_pieces_and_all_else_as_before(released) -> None:
    before, plain = released.tokenizer, with_plain_think(released)
    own = think_token_ids(before)
    assert own == tuple(before.convert_tokens_to_ids(["<think>", "</think>"])) and len(set(own)) == 2
    assert before("<think>")["input_ids"] == [own[0]], "the released tokenizer is left as it is"
    assert think_token_ids(plain.tokenizer) == ()
    for tag in ("<think>", "</think>"):
        assert plain.tokenizer(tag)["input_ids"] == in_pieces(tag)
    for text in ("<tool_call>1</tool_call>", "<|im_start|>user\n<|vision_start|><|image_pad|>", "think: thin <b>"):
        assert plain.tokenizer(text)["input_ids"] == before(text)["input_ids"]
    assert plain.image_token_id == plain.tokenizer.convert_tokens_to_ids("<|image_pad|>") == released.image_token_id


def test_prompts_have_the_pieces(released) -> None:
    template = "{{ content }} Think within <think> </think> tags."
    plain = builder(with_plain_think(released), template=template).compact_ids("<image>?", num_images=1)
    tagged = builder(released, template=template).compact_ids("<image>?", num_images=1)
    own = dict(zip(think_token_ids(released.tokenizer), ("<think>", "</think>"), strict=True))
    expected = [piece for token in tagged for piece in (in_pieces(own[token]) if token in own else [token])]
    assert plain == expected and set(own) <= set(tagged)


def test_responses_in_pieces_are_the_same_text(released) -> None:
    plain = with_plain_think(released).tokenizer
    decoder = TextDecoder(describe_tokenizer(plain))
    ids = plain(TEXT)["input_ids"]
    assert decoder.decode(ids) == plain.decode(ids, skip_special_tokens=True) == TEXT


def test_the_exported_folder_has_the_same_tokenizer(released, tmp_path: Path) -> None:
    """Transformers and vLLM read these files; the folder has one of older versions besides."""
    released.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<think>": 999}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "suppress_tokens": [2]}')
    plain, own = with_plain_think(released).tokenizer, think_token_ids(released.tokenizer)
    save_plain_tokenizer(plain, tmp_path, own_ids=own)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == plain(TEXT)["input_ids"]
    assert think_token_ids(loaded) == () and loaded.get_vocab() == plain.get_vocab()
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.suppress_tokens) == (7, [2, *sorted(own)])
    (tmp_path / "generation_config.json").unlink()
    save_plain_tokenizer(plain, tmp_path, own_ids=own)
    assert not (tmp_path / "generation_config.json").exists()


def test_a_setting_without_effect_or_against_the_model_is_refused(processor) -> None:
    without = processor_with(processor, tokenizer_of("backend", "<tool_call>"))
    with pytest.raises(ValueError, match=r"plain_think_tokens has no effect: .*no tokens of their own for <think> and"):
        with_plain_think(without)
    thinking = processor_with(processor, tokenizer_of("backend", *ADDED))
    thinking.chat_template += "<think>\n"
    with pytest.raises(ValueError, match="the chat template writes <think> itself, so the model was trained"):
        with_plain_think(thinking)
    between = processor_with(processor, tokenizer_of("backend", "<think>", "</think>", "<tool_call>"))
    with pytest.raises(ValueError, match="would number others anew"):
        with_plain_think(between)
