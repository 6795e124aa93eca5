"""The key under which the check of all rows is kept: everything that its outcome depends on.

Not in it are images in files of their own outside of the data's folder: such a file that changes later, while the data
file does not, is noticed when the image is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.dataset import VisionDataset
from megatron_vppo.data.prompts import PromptBuilder
from megatron_vppo.data.row_cache import RowCache, file_identity, fingerprint_of
from megatron_vppo.data.sources import parse_source
from megatron_vppo.setup.hosts import own_versions
from megatron_vppo.setup.rewards import has_user_function

FOLDER = ".checked_rows"
_LIBRARIES = ("tokenizers", "jinja2", "pillow", "pyarrow", "datasets")


def row_cache(config: RunConfig, dataset: VisionDataset, builder: PromptBuilder) -> RowCache | None:
    """Returns the place of the check of these rows, next to the runs of all projects.

    None for data that lies on the hub or is read by `datasets`, which has caches of its own, and for a tokenizer that
    cannot be written down.
    """
    parts = key_parts(config, dataset, builder)
    return None if parts is None else RowCache(Path(config.trainer.runs_dir) / FOLDER, fingerprint_of(parts))


def key_parts(config: RunConfig, dataset: VisionDataset, builder: PromptBuilder) -> dict[str, Any] | None:
    """Collects the parts of the key, as values for JSON; None if they cannot be known."""
    path = Path(parse_source(dataset.source).location).absolute()
    tokenizer = _described_tokenizer(builder.processor)
    if not path.exists() or tokenizer is None:
        return None
    return {
        "files": file_identity([path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())),
        "selection": dataset.selection(),
        "processor": tokenizer,
        "geometry": dataclasses.asdict(builder.geometry),
        "template": builder.template,
        "system_prompt": builder.system_prompt,
        "max_prompt_length": config.data.max_prompt_length,
        "max_images": config.rollout.max_images_per_prompt,
        "on_bad_row": config.data.on_bad_row,
        "with_extras": has_user_function(config.reward),
        "versions": {**own_versions(), **{name: metadata.version(name) for name in _LIBRARIES}},
    }


def _described_tokenizer(processor: Any) -> dict[str, str] | None:
    """Describes what makes tokens of a text: the tokenizer as it is, and the chat template."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {
        "classes": f"{type(processor).__qualname__} {type(tokenizer).__qualname__}",
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "special": repr(sorted(tokenizer.special_tokens_map.items(), key=repr)),
        "chat_template": repr(processor.chat_template),
        "tokenizer_template": repr(tokenizer.chat_template),
        "image": f"{processor.image_token} {processor.image_token_id}",
        "video": f"{getattr(processor, 'video_token', None)} {getattr(processor, 'video_token_id', None)}",
    }
