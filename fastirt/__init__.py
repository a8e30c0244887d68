"""fastirt: training vision transformers for image retrieval (El-Nouby et al. 2021), fast."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The library's main functions, imported on first use, so that `import fastirt` is fast.
_MODULES = {
    "Config": "fastirt.config",
    "Model": "fastirt.inference.model",
    "Gallery": "fastirt.gallery",
    "RetrievalLoss": "fastirt.objective",
    "build_encoder": "fastirt.model.build",
    "contrastive_koleo": "fastirt.kernels",
    "load": "fastirt.inference.load",
    "load_dataset": "fastirt.datasets",
    "retrieval_metrics": "fastirt.retrieval.metrics",
    "search": "fastirt.retrieval.search",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
