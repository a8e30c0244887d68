"""Packaging: `fastirt`, with the folder `kernels/` installed as `fastirt.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "fastirt/__init__.py").read_text().splitlines() if "__version__" in line
)

EXTRAS = {  # for users; the README says what each brings
    "export": ["onnx", "onnxruntime", "onnxscript"],
    "parquet": ["pyarrow"],
    "lancedb": ["lancedb"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow-skinny"],
}
TEST = ["pytest", "pytorch-metric-learning", "playwright", *(package for extra in EXTRAS.values() for package in extra)]

setup(
    name="fastirt",
    version=VERSION,
    description="Vision transformers for image retrieval, trained at the speed of the hardware",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fastirt", "fastirt.*"])
    + [f"fastirt.{name}" for name in find_packages(include=["kernels", "kernels.*"])],
    package_dir={"fastirt.kernels": "kernels"},
    package_data={"fastirt.pages": ["templates/*"], "fastirt.export": ["templates/*"]},
    install_requires=[
        # 2.13.0 resolves to a CPU build on some indexes, with which torchvision cannot be imported
        "torch>=2.11,<2.13",
        "torchvision",
        "timm>=1.0.20",
        "nvidia-dali-cuda130>=2.0; platform_system == 'Linux'",
        "faiss-gpu>=1.14.3; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "faiss-cpu>=1.9; platform_system != 'Linux' or platform_machine != 'x86_64'",
        "safetensors>=0.8",  # earlier ones hold the GIL while they write: the loop would stop at each checkpoint
        "numpy>=2",
        "pillow",
        "jinja2",
        "matplotlib",
        "scikit-learn",
        "pyyaml",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        **EXTRAS,
        "bench": ["pytorch-metric-learning"],
        "test": TEST,
        "dev": [*TEST, "ruff==0.17.6", "mypy==2.4.1", "pre-commit", "pytest-xdist"],
    },
    entry_points={"console_scripts": ["fastirt = fastirt.cli:main"]},
)
