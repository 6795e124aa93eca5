"""A model's folder is opened as a whole: what is missing, broken or contradictory is named, all of it at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vppo.cli.main import main
from megatron_vppo.conversion.to_megatron import hf_to_megatron
from megatron_vppo.models.model_files import check_what_is_there, open_model_files
from megatron_vppo.planning.published import configuration_of
from tests.models.whole import save_whole_folder

TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "7"}]}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_whole_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a dotted key is written with two underscores."""
    described = json.loads(path.read_text())
    for key, value in changes.items():
        inner = described
        *sections, last = key.split("__")
        for section in sections:
            inner = inner[section]
        inner[last] = value
    path.write_text(json.dumps(described))


def move_template(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template=template)


def test_a_whole_folder(folder: Path) -> None:
    opened = open_model_files(folder)
    assert opened.eos_ids == (2,)
    assert opened.processor.image_token_id == opened.hf_config.image_token_id == 6


def test_a_template_of_the_tokenizer_is_used(folder: Path) -> None:
    """Qwen's own script for fine-tuning writes it only there."""
    expected = open_model_files(folder).processor.apply_chat_template(TURN, tokenize=False)
    move_template(folder)
    assert open_model_files(folder).processor.apply_chat_template(TURN, tokenize=False) == expected


def test_a_processor_in_the_files_of_older_versions(folder: Path) -> None:
    described = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**described["image_processor"], "processor_class": described["processor_class"]})
    )
    assert open_model_files(folder).processor.image_processor.patch_size == 14


def test_eos_of_the_generation_configuration_before_the_tokenizers(folder: Path) -> None:
    for eos, expected in (([8, 1], (8, 1)), (9, (9,)), (0, (0,)), (None, (2,)), ([], (2,))):
        change(folder / "generation_config.json", eos_token_id=eos)
        assert open_model_files(folder).eos_ids == expected
    (folder / "generation_config.json").unlink()
    assert open_model_files(folder).eos_ids == (2,)
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(
        ValueError, match=r"names no EOS token, neither in generation_config\.json nor in the tokenizer"
    ):
        open_model_files(folder)


def test_rotary_frequencies_among_the_weights_are_passed_over(folder: Path) -> None:
    """Older versions of transformers saved them. Newer ones, and vLLM, compute them."""
    tensors = load_file(folder / "model.safetensors")
    names = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "visual.rotary_pos_emb.inv_freq",
    )
    save_file({**tensors, **{name: torch.ones(16) for name in names}}, folder / "model.safetensors")
    open_model_files(folder)


def test_an_index_may_name_files_in_folders(folder: Path) -> None:
    """transformers opens them; it joins the folder and what the index says."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "part").mkdir()
    files = {name: "part/b.safetensors" if "layers" in name else "./a.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    open_model_files(folder)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_to(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, **changes)


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(7)}, folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no processor": (
        without("processor_config.json"),
        r"the image processor is missing: neither preprocessor_config\.json nor processor_config\.json",
    ),
    "no tokenizer": (without("tokenizer.json"), r"the tokenizer is missing: neither tokenizer\.json nor vocab\.json"),
    "a generation configuration that is a link to nothing": (
        lambda folder: (
            (folder / "generation_config.json").unlink(),
            (folder / "generation_config.json").symlink_to("x"),
        ),
        r"model is not whole:\n  - generation_config\.json is a link to nothing; download it again",
    ),
    **{
        f"eos {eos}": (
            set_to("generation_config.json", eos_token_id=eos),
            r"eos_token_id in generation_config\.json is .*; it is a token's number, or a list of them",
        )
        for eos in (2.0, True, [[2]], {"a": 2})
    },
    **{
        f"size {size}": (
            set_to("processor_config.json", image_processor__size=size),
            r"size of the image processor is .*; needed are pixels as shortest_edge and longest_edge",
        )
        for size in ({"min_pixels": 784, "max_pixels": 12544}, {"height": 224, "width": 224}, {"shortest_edge": 784})
    },
    "images that are not resized": (
        set_to("processor_config.json", image_processor__do_resize=False),
        r"do_resize of the image processor is False; images have to become whole patches",
    ),
    "two sets of weights": (
        lambda folder: (
            save_file({}, folder / "model-00001-of-00001.safetensors")
            or (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        ),
        r"model holds both model\.safetensors and model\.safetensors\.index\.json, which names other files: "
        r"transformers reads the first and vLLM the second; remove one",
    ),
    "generation not JSON": (
        written("generation_config.json", "{"),
        r"model is not whole:\n  - generation_config\.json is not valid JSON \(Expecting property",
    ),
    "generation no table": (written("generation_config.json", "[]"), r"generation_config\.json holds no table"),
    "generation too deep": (
        written("generation_config.json", "[" * 100_000),
        r"generation_config\.json is not valid JSON",
    ),
    "processor not JSON": (written("processor_config.json", ""), r"processor_config\.json is not valid JSON"),
    "tokenizer of nothing": (written("tokenizer.json", "{}"), r"transformers cannot load the tokenizer: "),
    "tokenizer not UTF-8": (
        lambda folder: (folder / "tokenizer.json").write_bytes(b'{"a": "\xff"}'),
        r"tokenizer\.json is not valid JSON \('utf-8' codec",
    ),
    "processor of text": (
        set_to("processor_config.json", processor_class="WhisperProcessor"),
        r"transformers cannot load the processor: |not the processor of a Qwen-VL",
    ),
    "no template": (without("chat_template.jinja"), r"there is no chat template, neither in chat_template\.jinja"),
    "template without images": (
        written("chat_template.jinja", "{% for m in messages %}{{ m['role'] }}{% endfor %}"),
        r"the chat template makes 0 image tokens of a turn with one image",
    ),
    "template that refuses": (
        written("chat_template.jinja", "{{ raise_exception('only text') }}"),
        r"the chat template fails on a turn with an image: only text",
    ),
    "template that is none": (
        written("chat_template.jinja", "{% for m in messages %}"),
        r"the chat template fails on a turn with an image: ",
    ),
    "another patch": (
        set_to("processor_config.json", image_processor__patch_size=16),
        r"patch_size of the image processor is 16, vision_config\.patch_size in config\.json is 14",
    ),
    "another merge": (
        set_to("processor_config.json", image_processor__merge_size=1),
        r"merge_size of the image processor is 1, vision_config\.spatial_merge_size in config\.json is 2",
    ),
    "another image token": (
        set_to("config.json", image_token_id=5),
        r"gives '<\|image_pad\|>' the id 6, image_token_id in config\.json is 5",
    ),
    "another start of images": (
        set_to("config.json", vision_start_token_id=4),
        r"gives '<\|vision_start\|>' the id 3, vision_start_token_id in config\.json is 4",
    ),
    "too few rows": (
        set_to("config.json", text_config__vocab_size=100),
        r"the tokenizer has 109 tokens, vocab_size in config\.json is 100",
    ),
    "EOS outside": (
        set_to("generation_config.json", eos_token_id=[2, 109]),
        r"eos_token_id in generation_config\.json is \[109\], vocab_size in config\.json is 109",
    ),
    "EOS of an image": (
        set_to("generation_config.json", eos_token_id=[2, 6]),
        r"eos_token_id in generation_config\.json has \[6\], tokens of images, which are never sampled",
    ),
    "two colors": (
        set_to("processor_config.json", image_processor__image_mean=[0.5, 0.5]),
        r"image_mean of the image processor is \(0\.5, 0\.5\)",
    ),
    "no deviation": (
        set_to("processor_config.json", image_processor__image_std=[0.0, 1.0, 1.0]),
        r"image_std of the image processor is \(0\.0, 1\.0, 1\.0\)",
    ),
    "sizes the other way round": (
        set_to("processor_config.json", image_processor__size={"shortest_edge": 785, "longest_edge": 784}),
        r"size of the image processor is .*; the least number of pixels comes first",
    ),
    "tokenizer of a clone without LFS": (
        written("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"tokenizer\.json is not valid JSON \(.*\); it is a pointer of Git LFS: run `git lfs pull`",
    ),
    "weights of a clone without LFS": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"model\.safetensors is not a safetensors file.*; it is a pointer of Git LFS",
    ),
    "tensor missing": (drop_a_tensor, r"lacks 1 tensors of the model, first \['model\.norm\.weight'\]"),
    "tensor of another shape": (
        reshape_a_tensor,
        r"model\.norm\.weight in .* has shape \(7,\), the configuration says \(192,\)",
    ),
    "no weights": (without("model.safetensors"), r"holds no weights"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named(case: str, folder: Path) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_model_files(folder)


def test_contradictions_are_named_together(folder: Path) -> None:
    change(folder / "config.json", image_token_id=5)
    change(folder / "processor_config.json", image_processor__patch_size=16)
    with pytest.raises(ValueError) as refused:
        open_model_files(folder)
    heading, *problems = str(refused.value).splitlines()
    assert heading == f"the files of {folder} contradict one another:"
    assert len(problems) == 2
    assert "image_token_id in config.json is 5" in problems[0]
    assert "patch_size of the image processor is 16" in problems[1]


def test_train_convert_and_plan_ask_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "config.json", image_token_id=5)
    config = folder.parent / "run.yaml"
    config.write_text(f"data: {{train_files: {folder / 'rows.jsonl'}}}\nmodel: {{path: {folder}, dtype: float32}}\n")
    (folder / "rows.jsonl").write_text('{"problem": "1", "answer": "1"}\n')
    said = []
    for command in (
        ["train", "--config", str(config)],
        ["convert", "hf-to-megatron", str(folder), str(folder.parent / "out")],
        ["plan", "--model", str(folder), "--gpus", "1", "--gpu-memory", "80"],
    ):
        assert main(command) == 2
        said.append(capsys.readouterr().err)
    assert "image_token_id in config.json is 5" in said[0]
    assert len(set(said)) == 1


def test_a_folder_without_processor_can_be_converted_and_planned(folder: Path, tmp_path: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert check_what_is_there(folder).text_config.vocab_size == 109
    assert configuration_of(str(folder)).text_config.vocab_size == 109
    hf_to_megatron(folder, tmp_path / "converted")
    (folder / "model.safetensors").unlink()
    assert configuration_of(str(folder)).text_config.vocab_size == 109
