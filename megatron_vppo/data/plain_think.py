"""The tags <think> and </think> in plain pieces of text, where a tokenizer has tokens of their own for them.

Qwen3-VL Instruct has such tokens from the family's vocabulary, and was not trained with them: its chat template never
writes them. A prompt that asks for the tags then shows the model two tokens that say nothing to it, and it does not
write them. In pieces ("<", "think", ">") they are words that it knows.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

THINK_TAGS = ("<think>", "</think>")
_TOKENIZER, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_GENERATION = "generation_config.json"


def think_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of the tokens that a tokenizer of transformers has for the tags; () if it has none."""
    added = tokenizer.get_added_vocab()
    return tuple(added[tag] for tag in THINK_TAGS if tag in added)


def with_plain_think(processor: Any) -> Any:
    """Returns a copy of a processor of transformers whose tokenizer has no tokens for the tags. All others keep their
    ids.

    Raises ValueError if it has none, if the chat template writes the tags, or if the tokenizer cannot do without.
    """
    tokenizer = processor.tokenizer
    if not think_token_ids(tokenizer):
        raise ValueError(
            "data.plain_think_tokens has no effect: the model's tokenizer has no tokens of their own for "
            f"{' and '.join(THINK_TAGS)}; leave it out"
        )
    if THINK_TAGS[0] in str(processor.chat_template):
        raise ValueError(
            f"data.plain_think_tokens: the chat template writes {THINK_TAGS[0]} itself, so the model was trained "
            "with its tokens; leave it out"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _forget_tags(Path(folder))
        plain = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    before = {token: number for token, number in tokenizer.get_vocab().items() if token not in THINK_TAGS}
    after = {token: number for token, number in plain.get_vocab().items() if token not in THINK_TAGS}
    own = set(think_token_ids(tokenizer))
    if before != after or any(own & set(plain(tag)["input_ids"]) for tag in THINK_TAGS):
        raise ValueError(
            f"data.plain_think_tokens: without its tokens for {' and '.join(THINK_TAGS)} the model's tokenizer would "
            "number others anew, or still write them; leave it out"
        )
    changed = copy.copy(processor)
    changed.tokenizer = plain
    return changed


def save_plain_tokenizer(tokenizer: Any, folder: Path, *, own_ids: Sequence[int]) -> None:
    """Writes a tokenizer of `with_plain_think` over the one of a model's folder, for those who load that.

    The model can still write the tokens that it has not, so the folder's generation configuration suppresses them.

    Args:
        own_ids: those that the folder's tokenizer had for the tags.
    """
    tokenizer.save_pretrained(folder)
    (folder / _ADDED).unlink(missing_ok=True)  # of older versions of transformers; it would bring the tokens back
    path = folder / _GENERATION
    if path.is_file():  # a new one would also say that nothing ends a response
        content = json.loads(path.read_text(encoding="utf-8"))
        content["suppress_tokens"] = sorted({*(content.get("suppress_tokens") or ()), *own_ids})
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _forget_tags(folder: Path) -> None:
    """Takes the tokens of the tags out of a saved tokenizer."""
    path = folder / _TOKENIZER
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in THINK_TAGS]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = folder / _SETTINGS
    content = json.loads(path.read_text(encoding="utf-8"))
    if decoder := content.get("added_tokens_decoder"):  # of older versions; an empty one would mean no added tokens
        content["added_tokens_decoder"] = {key: one for key, one in decoder.items() if one["content"] not in THINK_TAGS}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(content.get(name), list):
            content[name] = [token for token in content[name] if token not in THINK_TAGS]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / _ADDED).unlink(missing_ok=True)
