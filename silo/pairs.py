"""Text pairs out of Python source: a function's signature and docstring, and the body that follows.

A model that is trained on such a pair learns to write the second from the first, with loss on the body only. Pairs are
cut from the text, not printed from the syntax tree, so that comments and layout stay as their author left them.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import replace

from silo.documents import Document

SHORTEST_BODY_LINES = 3
"""Bodies with fewer lines that hold anything say nothing that the name does not."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def pairs_of(document: Document) -> Iterator[Document]:
    """The pairs of a Python document, in the order of its text; none if it does not parse.

    A pair's id is ``FILEID#qualname``, with ``@LINE`` behind the second function of that name; all else is inherited.
    """
    text = document.text.replace("\r\n", "\n").replace("\r", "\n")
    if document.prompt or "def " not in text:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are their author's business
            tree = ast.parse(text)
            functions = list(_functions(tree, ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.split("\n")  # as the parser counts them: splitlines() would also break at form feeds
    seen: set[str] = set()
    for name, function in sorted(functions, key=lambda found: found[1].lineno):
        pair = _cut(function, lines)
        if pair is None:
            continue
        id = f"{document.id}#{name}" if name not in seen else f"{document.id}#{name}@{function.lineno}"
        seen.add(name)
        yield replace(document, id=id, prompt=pair[0], text=pair[1])


def _functions(node: ast.AST, scope: str) -> Iterator[tuple[str, _Function]]:
    """Every function under a node with its qualified name, spelled as Python's ``__qualname__``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield scope + child.name, child
            yield from _functions(child, f"{scope}{child.name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{scope}{child.name}.")
        elif not isinstance(child, ast.expr):  # no expression holds a def
            yield from _functions(child, scope)


def _cut(function: _Function, lines: list[str]) -> tuple[str, str] | None:
    """Prompt and completion of a function, or None where it has no docstring or too short a body.

    Decorators belong to the caller's side of a function and are left out.
    """
    first, *rest = function.body
    if not rest or ast.get_docstring(function, clean=False) is None:
        return None
    split, end = first.end_lineno or 0, function.end_lineno or 0
    if rest[0].lineno <= split:  # a statement on the docstring's own line
        return None
    while not lines[split].strip():  # blank lines between the two stay with the prompt
        split += 1
    indent = lines[function.lineno - 1][: function.col_offset]
    if indent.strip() or sum(bool(line.strip()) for line in lines[split:end]) < SHORTEST_BODY_LINES:
        return None
    plain = [line.removeprefix(indent) for line in lines[function.lineno - 1 : end]]
    cut = split - function.lineno + 1
    return "\n".join(plain[:cut]) + "\n", "\n".join(plain[cut:]) + "\n"
