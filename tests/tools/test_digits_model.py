"""The cold-start model: an ordinary Hugging Face folder, and training on exactly what the processor makes of a row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint
from digits.cold_start import (
    accuracy,
    boxed_number,
    load_rows,
    misread,
    prompt_inputs,
    train,
    with_responses,
)
from digits.pairs import PAIRS
from digits.rows import write_data
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the sum?"}]}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, PAIRS, train=16, val=4, held_out=0.25, seed=5)
    return folder


def trained(data: Path):
    processor = make_processor()
    model = make_model(make_config(processor.tokenizer), seed=3)
    reached = train(
        model, processor, PAIRS, load_rows(data, "train", processor), load_rows(data, "val", processor),
        band=(0, 1), stop_at=0.5, max_steps=2, batch=8, misread_share=0.5, lr=1e-3, seed=4, report=lambda line: None,
    )  # fmt: skip
    return model, processor, reached


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    model, processor, reached = trained(data)
    assert reached.steps == 2
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(model, processor, folder)
    return model, folder


def test_every_printable_character_comes_back(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved[1])
    text = "".join(map(chr, range(32, 127))) + "\nthe user's assistants \\boxed{17}"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer)
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_processor_of_the_folder(saved):
    processor = AutoProcessor.from_pretrained(saved[1])
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is the sum?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8))
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (inputs["input_ids"] == image_id).sum() == 8
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8]]
    # Normalised, not resized: the first patch is the upper left 14x14 pixels, twice over time.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, :14, :14] / 255
    # The mean and deviation of OpenAI's CLIP, as every released Qwen2.5-VL has them.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    first_patch = inputs["pixel_values"][0].view(3, 2, 14, 14)
    expected = ((pixels - mean[:, None, None]) / std[:, None, None])[:, None].expand(3, 2, 14, 14)
    torch.testing.assert_close(first_patch, expected, atol=1e-5, rtol=0)


def test_system_turn_is_written_only_when_given():
    text = make_processor().apply_chat_template([{"role": "system", "content": "Be brief."}, *MESSAGES])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_weights_and_config_of_the_folder(saved):
    model, folder = saved
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert 2e6 < sum(p.numel() for p in loaded.parameters()) < 3e6
    text, vision = loaded.config.text_config, loaded.config.vision_config
    assert text.hidden_size // text.num_attention_heads >= 32  # what vLLM's CPU attention takes
    assert vision.hidden_size // vision.num_heads >= 32
    layers = set(range(vision.depth))
    assert layers & set(vision.fullatt_block_indexes) and layers - set(vision.fullatt_block_indexes)
    assert loaded.generation_config.eos_token_id == [text.eos_token_id]
    assert text.vocab_size == len(AutoTokenizer.from_pretrained(folder))


def test_training_reads_the_processors_prompt_and_learns_only_the_response(data):
    processor = make_processor()
    rows = load_rows(data, "train", processor)
    assert rows.prompt == processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    one_by_one = [
        processor(text=[rows.prompt], images=[Image.fromarray(image.permute(1, 2, 0).numpy())], return_tensors="pt")
        for image in rows.images[:3]
    ]
    inputs = prompt_inputs(processor, rows, torch.arange(3))
    assert torch.equal(inputs["pixel_values"], torch.cat([one["pixel_values"] for one in one_by_one]))
    assert torch.equal(inputs["input_ids"], torch.cat([one["input_ids"] for one in one_by_one]))

    together, labels_BL = with_responses(inputs, [[20, 2], [21, 22, 2], [2]], pad=0)
    width = inputs["input_ids"].shape[1]
    assert labels_BL[:, width:].tolist() == [[20, 2, -100], [21, 22, 2], [2, -100, -100]]
    assert (labels_BL[:, :width] == -100).all()
    assert together["attention_mask"][:, width:].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert torch.equal(together["input_ids"][:, :width], inputs["input_ids"])


def test_the_same_seed_trains_the_same_weights(saved, data):
    again, _, _ = trained(data)
    for name, weight in saved[0].state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_misread_demonstrations_have_one_wrong_digit():
    digits = torch.randint(10, (20_000, 2), generator=torch.Generator().manual_seed(1))
    told = misread(digits, share=0.3, generator=torch.Generator().manual_seed(2))
    wrong = told != digits
    assert told.min() == 0 and told.max() == 9
    assert not wrong.all(dim=1).any(), "never both digits"
    assert wrong.float().mean(dim=0).tolist() == pytest.approx([0.15, 0.15], abs=0.01)  # 4 standard errors
    offsets = ((told - digits) % 10)[wrong]
    assert offsets.bincount(minlength=10)[1:].float().div(len(offsets)).tolist() == pytest.approx(
        [1 / 9] * 9, abs=0.017
    )
    assert torch.equal(misread(digits, share=0.0, generator=torch.Generator()), digits)


def test_a_model_outside_the_band_is_refused(data):
    processor = make_processor()
    rows = load_rows(data, "val", processor)
    model = make_model(make_config(processor.tokenizer), seed=3)
    with pytest.raises(RuntimeError, match=r"held-out accuracy is 0\.000 after 1 steps, outside 0\.3 \.\. 0\.45"):
        train(
            model, processor, PAIRS, rows, rows,
            band=(0.3, 0.45), stop_at=0.36, max_steps=1, batch=2, misread_share=0.0, lr=1e-3, seed=4,
            report=lambda line: None,
        )  # fmt: skip


def test_accuracy_counts_right_sums(data, monkeypatch):
    """Responses are written by hand: right for rows 0 and 2, wrong for 1, no box for 3."""
    processor = make_processor()
    rows = load_rows(data, "val", processor)
    model = make_model(make_config(processor.tokenizer), seed=3)
    sums = rows.digits.sum(dim=1).tolist()
    texts = [rf"\boxed{{{sums[0]}}}", rf"\boxed{{{sums[1] + 1}}}", rf"\boxed{{99}} \boxed{{{sums[2]}}}", str(sums[3])]
    responses = [[*processor.tokenizer(text)["input_ids"], processor.tokenizer.eos_token_id] for text in texts]

    def generate(**inputs):
        kept = {k: inputs[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        return with_responses(kept, responses, pad=processor.tokenizer.pad_token_id)[0]["input_ids"]

    monkeypatch.setattr(model, "generate", generate)
    assert accuracy(model, processor, PAIRS, rows, samples=0) == 0.5


def test_solutions_box_the_sum_and_name_both_digits():
    for wording in range(PAIRS.wordings):
        text = PAIRS.solution((8, 9), (wording,))
        assert boxed_number(text) == 17
        assert text.index("8") < text.index("9") < text.index("17")
    assert boxed_number("17") is None
    assert boxed_number(r"\boxed{3} and then \boxed{4}") == 4
