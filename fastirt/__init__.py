"""fastirt: training vision transformers for image retrieval (El-Nouby et al. 2021), fast."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What a library user needs, imported when it is asked for: `import fastirt` alone costs nothing.
_HOMES = {
    "Config": "fastirt.config",
    "RetrievalLoss": "fastirt.objective",
    "build_encoder": "fastirt.model.build",
    "contrastive_koleo": "fastirt.kernels",
    "load_dataset": "fastirt.datasets",
    "retrieval_metrics": "fastirt.retrieval.metrics",
    "search": "fastirt.retrieval.search",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
