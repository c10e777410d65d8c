"""Text pairs: cut out of Python files, without changing a character that matters."""

import ast
import warnings
from pathlib import Path

import pytest

import silo.files
from silo.documents import Document
from silo.pairs import pairs_of

SOURCE = '''
import os

class Greeter:
    @property
    def greet(self, name: str) -> str:
        """Greet somebody.

        Politely.
        """

        # A comment stays with the body.
        name = name.strip()
        words = """
  not indented
        """
        return f"hello {name}"

    def greet(self):
        "Greet nobody."
        a = 1
        b = 2
        return a + b

async def outer(
    x,
):
    """Outer."""
    def inner():
        """Inner."""
        y = 1
        y += 1
        return y
    return inner

def short():
    """Two lines are too few."""
    x = 1
    return x

def same_line():
    """Docstring."""; x = 1
    y = 2
    z = 3
    return x

def bare():
    x = 1
    y = 2
    return x + y
'''


def pairs(text: str) -> dict[str, Document]:
    document = Document(id="m.py", text=text, license="MIT", owner="Ada", source="s", title="t")
    return {pair.id: pair for pair in pairs_of(document)}


def test_functions_with_a_docstring_and_a_body_become_pairs():
    """Exactly the functions with a docstring and three lines behind it give a pair, each with an id of its own."""
    assert list(pairs(SOURCE)) == [
        "m.py#Greeter.greet",
        "m.py#Greeter.greet@19",
        "m.py#outer",
        "m.py#outer.<locals>.inner",
    ]


def test_a_pair_is_the_source_dedented():
    """Signature and docstring are the prompt, the rest with its comments the completion, at the left margin."""
    pair = pairs(SOURCE)["m.py#Greeter.greet"]
    assert pair.prompt == ('def greet(self, name: str) -> str:\n    """Greet somebody.\n\n    Politely.\n    """\n\n')
    assert pair.text == (
        '    # A comment stays with the body.\n    name = name.strip()\n    words = """\n  not indented\n'
        '    """\n    return f"hello {name}"\n'
    )
    assert (pair.license, pair.owner, pair.source, pair.title) == ("MIT", "Ada", "s", "t")


def test_every_pair_of_a_real_file_parses():
    """Prompt and completion of each pair are together one function that Python parses."""
    found = pairs(Path(silo.files.__file__).read_text())
    assert len(found) >= 5
    for pair in found.values():
        assert len(ast.parse(pair.full_text).body) == 1


@pytest.mark.parametrize("text", ["def f(:", "", "no python here", "\0 def f(): 1", "def f(): " + "(" * 5000, "x = 1"])
def test_what_does_not_parse_gives_no_pairs(text):
    """A file that is no Python, or none that this Python parses, gives no pairs and no error."""
    assert pairs(text) == {}


def test_line_ends_and_form_feeds_do_not_shift_the_cut():
    """CR LF line ends and a form feed, which only Python's parser takes for no line end, leave the cut in place."""
    text = "x = 1\r\n\x0c\r\ndef f():\r\n    '''Doc.'''\r\n    a = '\u2028'\r\n    b = 2\r\n    return a\r\n"
    assert pairs(text)["m.py#f"].prompt == "def f():\n    '''Doc.'''\n"


def test_invalid_escapes_stay_silent():
    """Parsing another's code prints no warning about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pairs("def f():\n    'Doc.'\n    a = '\\d'\n    b = 2\n    return a\n")


def test_a_pair_gives_no_pairs():
    """A document that is a pair already is left alone."""
    assert list(pairs_of(Document(id="p", prompt="x", text=SOURCE))) == []
