"""The files of a model's folder, opened once and checked against one another; the weights by their names alone.

A mistake here ends every command at its start, with the file's name. Found later, it would come from transformers or
vLLM, from every rank, after minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, GenerationConfig

from megatron_vppo.models.families import family_of, hf_copies, weight_map
from megatron_vppo.models.hf_config import HfConfig, vision_token_ids
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.weights.hf_folder import how_to_mend
from megatron_vppo.weights.load import check_weight_files

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""One of each kind describes the image processor and the tokenizer."""
GENERATION = "generation_config.json"
_JSON_FILES = (
    *PROCESSOR_FILES, *TOKENIZER_FILES, GENERATION, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip
_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1"}]}]
"""A turn with one image, to try the chat template."""


@dataclass(frozen=True)
class ModelFiles:
    """The parts of a model besides its weights, opened."""

    hf_config: HfConfig
    processor: Any
    """transformers' processor: tokenizer, image processor, chat template."""
    eos_ids: tuple[int, ...]
    """The tokens at which a response ends."""
    suppressed_ids: tuple[int, ...] = ()
    """The tokens that its generation configuration says are never to be sampled (suppress_tokens)."""


def open_model_files(folder: Path) -> ModelFiles:
    """Opens configuration, processor, tokenizer and chat template, and checks them and the names of the weights.

    Raises:
        ValueError: a file is missing or cannot be read, or files contradict one another. The message has all that was
            found.
    """
    files = open_without_weights(folder)
    check_weight_names(folder, files.hf_config)
    return files


def open_without_weights(folder: Path) -> ModelFiles:
    """Does the same without a look at the weights, which may be in another folder."""
    hf_config = read_hf_config(folder)
    if problems := [*_unreadable(folder), *_missing(folder)]:
        raise ValueError(_listed(f"{folder} is not whole:", problems))
    processor = _load_processor(folder)
    generation = _generation(folder)
    eos_ids = _eos_ids(folder, generation, processor.tokenizer)
    problems = [
        *_tokenizer_problems(hf_config, processor, eos_ids),
        *_image_problems(hf_config, processor.image_processor),
        *_template_problems(processor),
    ]
    if problems:
        raise ValueError(_listed(f"the files of {folder} contradict one another:", problems))
    return ModelFiles(hf_config, processor, eos_ids, tuple(generation.suppress_tokens or ()))


def check_what_is_there(folder: Path) -> HfConfig:
    """Returns the configuration of a folder that may lack processor and weights, after checking all that is there.

    Raises:
        ValueError: as `open_model_files`, except for files that are missing.
    """
    hf_config = read_hf_config(folder)
    if problems := list(_unreadable(folder)):
        raise ValueError(_listed(f"{folder} is not whole:", problems))
    return hf_config if list(_missing(folder)) else open_without_weights(folder).hf_config


def check_weight_names(folder: Path, hf_config: HfConfig) -> None:
    """Checks the names and shapes of the weights, from the headers of their files."""
    family = family_of(hf_config)
    entries = weight_map(hf_config, family=family)
    check_weight_files(folder, entries, copies=hf_copies(entries), to_released_name=family.to_released_name)


def _listed(heading: str, problems: list[str]) -> str:
    return "\n  - ".join([heading, *problems])


# --- Each file --------------------------------------------------------------------------------------------------------


def _unreadable(folder: Path) -> Iterator[str]:
    for name in _JSON_FILES:
        path = folder / name
        if not path.exists() and path.is_symlink():  # a snapshot of the hub's cache that was copied without its blobs
            yield f"{name} is a link to nothing; download it again"
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            yield f"{name} is not valid JSON ({error}); {how_to_mend(path)}"
        else:
            if not isinstance(content, dict):
                yield f"{name} holds no table of settings; download it again"


def _missing(folder: Path) -> Iterator[str]:
    for what, names in (("image processor", PROCESSOR_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any((folder / name).is_file() for name in names):
            yield f"the {what} is missing: neither {names[0]} nor {names[1]}"


def _load_processor(folder: Path) -> Any:
    """Loads the processor; the tokenizer's chat template is used if the processor has none of its own."""
    loading: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = AutoProcessor.from_pretrained(folder, **loading)
    except Exception as error:  # transformers raises whatever it runs into
        parts: dict[str, Callable[..., Any]] = {
            "the tokenizer": AutoTokenizer.from_pretrained,
            "the image processor": AutoImageProcessor.from_pretrained,
        }
        broken = [what for what, load in parts.items() if not _loads(load, folder, loading)]
        raise ValueError(
            f"{folder}: transformers cannot load {' and '.join(broken) or 'the processor'}: {error}"
        ) from error
    lacking = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if lacking or not hasattr(processor, "image_token_id"):
        raise ValueError(
            f"{folder}: transformers loads a {type(processor).__name__}, which is not the processor of a Qwen-VL; "
            f"processor_class in {' or '.join(PROCESSOR_FILES)} names it"
        )
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def _loads(load: Callable[..., Any], folder: Path, loading: dict[str, Any]) -> bool:
    try:
        load(folder, **loading)
    except Exception:  # see above
        return False
    return True


def _generation(folder: Path) -> GenerationConfig:
    """Reads the generation configuration; one that says nothing if there is none."""
    if not (folder / GENERATION).is_file():
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # see above
        raise ValueError(f"{folder / GENERATION}: {error}") from error


def _eos_ids(folder: Path, generation: GenerationConfig, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens at which the model stops, from its generation configuration, else from its tokenizer."""
    generated: Any = generation.eos_token_id
    eos = tokenizer.eos_token_id if generated in (None, []) else generated
    if eos is None:
        raise ValueError(f"{folder} names no EOS token, neither in {GENERATION} nor in the tokenizer")
    return tuple(eos) if isinstance(eos, list) else (eos,)


# --- Files against one another ----------------------------------------------------------------------------------------


def _tokenizer_problems(hf_config: HfConfig, processor: Any, eos_ids: tuple[int, ...]) -> Iterator[str]:
    tokenizer, vocabulary = processor.tokenizer, hf_config.text_config.vocab_size
    if len(tokenizer) > vocabulary:
        yield f"the tokenizer has {len(tokenizer)} tokens, vocab_size in config.json is {vocabulary}"
    for name in ("image", "video"):
        token = getattr(processor, f"{name}_token", None)
        ours, theirs = getattr(processor, f"{name}_token_id", None), getattr(hf_config, f"{name}_token_id", None)
        if theirs is not None and ours != theirs:
            yield f"the tokenizer gives {token!r} the id {ours}, {name}_token_id in config.json is {theirs}"
    for name in ("vision_start", "vision_end"):
        token, theirs = f"<|{name}|>", getattr(hf_config, f"{name}_token_id", None)
        if token in tokenizer.get_added_vocab() and theirs not in (None, tokenizer.get_added_vocab()[token]):
            yield (
                f"the tokenizer gives {token!r} the id {tokenizer.get_added_vocab()[token]}, {name}_token_id in "
                f"config.json is {theirs}"
            )
    if not all(type(token) is int for token in eos_ids):
        yield f"eos_token_id in {GENERATION} is {list(eos_ids)}; it is a token's number, or a list of them"
        return
    if never := sorted(set(eos_ids) & set(vision_token_ids(hf_config))):
        yield f"eos_token_id in {GENERATION} has {never}, tokens of images, which are never sampled"
    if outside := [token for token in eos_ids if not 0 <= token < vocabulary]:
        yield f"eos_token_id in {GENERATION} is {outside}, vocab_size in config.json is {vocabulary}"


def _image_problems(hf_config: HfConfig, image_processor: Any) -> Iterator[str]:
    vision = hf_config.vision_config
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        if getattr(image_processor, ours, None) != getattr(vision, theirs):
            yield (
                f"{ours} of the image processor is {getattr(image_processor, ours, None)}, "
                f"vision_config.{theirs} in config.json is {getattr(vision, theirs)}"
            )

    for name in ("image_mean", "image_std"):
        values = getattr(image_processor, name, None)
        if not isinstance(values, list | tuple) or len(values) != 3 or (name == "image_std" and min(values) <= 0):
            yield f"{name} of the image processor is {values}; it has one value for each color, a deviation above 0"
    if not image_processor.do_resize:
        yield f"do_resize of the image processor is {image_processor.do_resize}; images have to become whole patches"
    size = image_processor.size
    edges = [size.get(name) for name in ("shortest_edge", "longest_edge")]
    if not all(type(pixels) is int for pixels in edges):
        yield f"size of the image processor is {dict(size)}; needed are pixels as shortest_edge and longest_edge"
    elif edges[0] > edges[1]:
        yield f"size of the image processor is {dict(size)}; the least number of pixels comes first"


def _template_problems(processor: Any) -> Iterator[str]:
    """Tries the chat template with one image."""
    if processor.chat_template is None:
        yield (
            "there is no chat template, neither in chat_template.jinja or .json nor in tokenizer_config.json; copy the "
            "one of the released model"
        )
        return
    try:
        text = processor.apply_chat_template(_PROBE, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise anything
        yield f"the chat template fails on a turn with an image: {error}"
        return
    found = list(processor.tokenizer(text)["input_ids"]).count(processor.image_token_id)
    if found != 1:
        yield f"the chat template makes {found} image tokens of a turn with one image"
