"""A tiny real processor (tokenizer, chat template, Qwen2-VL image processor) and images to feed it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

from tests.data.images import noise_image

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# As Qwen2.5-VL's own: a default system turn, vision marks around each image.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def processor() -> Qwen2_5_VLProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """a.png 90x60, b.png 60x120, c.jpg 100x80 (greyscale), and a turned JPEG: 50x30 stored, 30x50 seen."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise_image(90, 60, seed=1).save(folder / "a.png")
    noise_image(60, 120, seed=2).save(folder / "b.png")
    noise_image(100, 80, seed=3, mode="L").save(folder / "c.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(50, 30, seed=4).save(folder / "turned.jpg", exif=exif)
    return folder
