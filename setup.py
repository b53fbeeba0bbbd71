"""Packaging: `fastgrpo`, and `fastgrpo_kernels` from the plain source folder kernels/."""

from setuptools import find_packages, setup

# Its models are in its wheel. It asks for opencv-python; where that cannot be had (no libGL), opencv-python-headless works.
OCR = "rapidocr-onnxruntime>=1.4; python_version < '3.13'"
HTTP = "httpx2>=2,<3"  # of judges and remote rewards; huggingface_hub 2 brings it along
SERVE = ["fastapi", "uvicorn", HTTP]  # rewards behind HTTP

setup(
    name="fastgrpo",
    version="0.1.0",
    description="Online reinforcement learning for flow-matching image generators",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fastgrpo", "fastgrpo.*"]) + find_packages("kernels"),
    package_dir={"fastgrpo_kernels": "kernels/fastgrpo_kernels"},
    package_data={
        "fastgrpo.reporting": ["*.html"],
        "fastgrpo.models": ["architectures/*.json"],
        "fastgrpo.tiny": ["prompts/*", "weights/*", "weights/*/*"],
        "fastgrpo.tiny.text": ["prompts/*", "weights/*", "weights/*/*"],
    },
    install_requires=[
        "torch>=2.11",
        # On a GPU with any numpy; the interpreter of 3.6, for tests without one, needs numpy<2.4 (fastgrpo/interpreter.py).
        "triton>=3.6; platform_system == 'Linux'",
        "diffusers>=0.42",
        "transformers>=5.23",
        "peft>=0.21",
        "accelerate",
        # fastgrpo/engine/zero.py switches off one of its operations by an internal name, and was tested with this release.
        "deepspeed>=0.19.8,<0.20",
        "numpy",
        "scipy",
        "pillow",
        "pyyaml",
        "safetensors",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "ruff", OCR, *SERVE],
        "ocr": [OCR],
        "judge": [HTTP],
        "serve": SERVE,
        "flash": ["flash-attn>=2.6.3"],
        "xformers": ["xformers>=0.0.29"],
    },
    entry_points={"console_scripts": ["fastgrpo=fastgrpo.commands.cli:main"]},
)
