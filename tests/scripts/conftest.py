"""What the tests of scripts share."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    """A function that imports one of the scripts, such as ``render_results`` or ``bench.store``, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def bench(script):
    """The same of a module of ``scripts/bench``."""
    return lambda name: script(f"bench.{name}")
