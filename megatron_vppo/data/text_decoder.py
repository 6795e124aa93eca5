"""From sampled tokens to text, as transformers makes it, in processes that do not import transformers.

Its tokenizers leave decoding to those of the package tokenizers, which can be copied to another process as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer


class TextDecoder:
    """Decodes the tokens of responses, leaving out special tokens."""

    def __init__(self, description: str) -> None:
        """
        Args:
            description: what `describe_tokenizer` returns.
        """
        self._tokenizer = Tokenizer.from_str(description)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of one response."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def describe_tokenizer(tokenizer: Any) -> str:
    """Describes a tokenizer of transformers for TextDecoder, as JSON.

    The merges of a BPE model, the most of its memory, are left out: only encoding reads them.

    Raises ValueError if the tokenizer of transformers does more to a text than its copy can.
    """
    from transformers import PreTrainedTokenizerFast

    name = type(tokenizer).__name__
    for method in ("decode", "_decode"):
        if getattr(type(tokenizer), method, None) is not getattr(PreTrainedTokenizerFast, method):
            raise ValueError(f"the model's tokenizer {name} decodes in a way of its own; use one with a tokenizer.json")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    is_bpe = model["type"] == "BPE"
    if tokenizer.clean_up_tokenization_spaces and not (
        is_bpe and not tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    ):
        raise ValueError(
            f"the model's tokenizer {name} takes blanks out of texts; set clean_up_tokenization_spaces to false in its "
            "tokenizer_config.json"
        )
    if is_bpe:
        model["merges"] = []
    return json.dumps(description)
