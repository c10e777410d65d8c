"""SILO: a language model that learns from permissive text and reads the rest from files that can be deleted.

Names load when they are first used, so that ``import silo`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from silo.documents import Document
    from silo.errors import SiloError
    from silo.language_model import LanguageModel
    from silo.mixture import Mixture
    from silo.modeling import SiloConfig, SiloForCausalLM
    from silo.weights import Weights

__all__ = ["Document", "LanguageModel", "Mixture", "SiloConfig", "SiloError", "SiloForCausalLM", "Weights"]

_HOMES = {
    "Document": "silo.documents",
    "LanguageModel": "silo.language_model",
    "Mixture": "silo.mixture",
    "SiloConfig": "silo.modeling",
    "SiloError": "silo.errors",
    "SiloForCausalLM": "silo.modeling",
    "Weights": "silo.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
