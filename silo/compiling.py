"""How the inner loops of searches are compiled, by numba.

Written with numpy's functions, such a loop is several passes over memory by calls too short for more than one thread,
since each holds the interpreter's lock; these hold none. They are compiled when they are first called, which takes some
seconds, and kept beside their file or in the user's cache, whichever can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """A function that holds no lock while it runs. Every operation rounds by itself, unless ``options`` say other.

    It may be given arrays and numbers, no tuples: code that is kept has the places of a tuple's fields in it, and is
    not made anew when the file that names them puts them in another order. For the same reason it calls functions and
    reads constants of its own file only.
    """
    try:
        made: Function = numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # there is no place that the compiled code could be kept in
        made = numba.njit(nogil=True, **options)(function)
    return made
