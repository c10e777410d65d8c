"""Documents on their way through JSON Lines: nothing is lost, and each bad line is named."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.documents import NO_LICENSE, Document, DocumentFiles, parse_document, read_documents
from silo.errors import DataError, UsageError
from silo.files import canonical_json

GOOD = b'{"id": "a", "text": "some text", "license": "MIT"}'
TEXT = st.text(min_size=1)
DOCUMENTS = st.builds(
    Document,
    id=TEXT,
    text=TEXT,
    prompt=st.text(),
    license=TEXT.map(str.strip).filter(bool),
    owner=st.text(),
    source=st.text(),
    title=st.text(),
)


@given(DOCUMENTS)
def test_a_document_comes_back_as_it_went(document):
    """Writing a document as a line and reading it gives the same document, whatever text it holds."""
    line = canonical_json(document.to_json())
    assert line.count(b"\n") == 1
    assert parse_document(line, where="x") == document
    escaped = json.dumps(document.to_json()).encode()
    assert parse_document(escaped, where="x") == document


@given(DOCUMENTS, DOCUMENTS)
def test_the_content_hash_is_of_the_text_alone(first, second):
    """Two documents have one content hash exactly when prompt and text agree, whatever else is known of them."""
    same = (first.prompt, first.text) == (second.prompt, second.text)
    assert (first.content_hash == second.content_hash) == same


def test_prompt_and_text_do_not_run_together():
    """Moving a character from prompt to text changes the content hash and not the full text."""
    one, other = Document(id="a", prompt="ab", text="c"), Document(id="a", prompt="a", text="bc")
    assert one.full_text == other.full_text == "abc"
    assert one.content_hash != other.content_hash


def test_a_file_is_read_in_order(tmp_path: Path):
    """Documents come in the order of the lines; blank lines, a byte-order mark and missing fields are no error."""
    file = tmp_path / "x.jsonl"
    pair = '{"id": "b", "prompt": "p", "completion": "c", "owner": null, "more": [1]}'
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\n  \n" + pair.encode())
    assert list(read_documents(file)) == [
        Document(id="a", text="some text", license="MIT"),
        Document(id="b", prompt="p", text="c", license=NO_LICENSE),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not valid JSON"),
        (b'{"id": "b", "text": "x"} {}', "not valid JSON"),
        (b'{"id": "b", "text": "\xff"}', "not valid JSON"),
        (b'{"id": "b", "text": "\xed\xa0\x80"}', "not valid JSON"),
        ('{"id": "b", "text": "x"}'.encode("utf-16"), "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"id": "b", "text": "\\ud800"}', "unpaired surrogate"),
        (b'{"id": "b\\uDC00", "text": "x"}', "unpaired surrogate"),
        (b'["id", "text"]', "a list, expected an object"),
        (b"null", "a NoneType, expected an object"),
        (b'{"text": "x"}', "field 'id' is missing, expected a non-empty string"),
        (b'{"id": 3, "text": "x"}', "field 'id' is of type int"),
        (b'{"id": "", "text": "x"}', "field 'id' is empty"),
        (b'{"id": "b"}', "field 'text' is missing"),
        (b'{"id": "b", "text": ""}', "field 'text' is empty"),
        (b'{"id": "b", "text": null}', "field 'text' is of type NoneType"),
        (b'{"id": "b", "prompt": "x"}', "field 'completion' is missing"),
        (b'{"id": "b", "completion": "x"}', "field 'prompt' is missing"),
        (b'{"id": "b", "prompt": "x", "completion": ""}', "field 'completion' is empty"),
        (b'{"id": "b", "text": "x", "license": ["MIT"]}', "field 'license' is of type list, expected a string"),
        (b'{"id": "b", "text": "x", "owner": 3}', "field 'owner' is of type int"),
        (b'{"id": "a", "text": "x"}', "id 'a' was already used in line 1; ids are unique"),
    ],
)
def test_each_bad_line_is_named(tmp_path: Path, line: bytes, said: str):
    """A line that is no document is a DataError with file, line number, what was found and what was expected."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(GOOD + b"\n\n" + line.replace(b"\n", b"") + b"\n")
    with pytest.raises(DataError) as error:
        list(read_documents(file))
    assert str(error.value).startswith(f"{file}:3: ")
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes):
    """A file without a document is a DataError, not a corpus of nothing."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jsonl holds no document; expected JSON Lines"):
        list(read_documents(file))


def test_a_missing_file_is_wrong_use(tmp_path: Path):
    """A path that is no file is a UsageError that names it."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UsageError, match="does not exist or is not a file"):
            list(read_documents(path))


@pytest.mark.parametrize("license", ["", "  ", None])
def test_a_licence_that_nobody_states_is_none(license):
    """An empty licence field is the same as a missing one: NOASSERTION, which is restricted."""
    line = json.dumps({"id": "a", "text": "x", "license": license}).encode()
    assert parse_document(line, where="x").license == NO_LICENSE


def test_what_is_compressed_is_read_like_the_rest(tmp_path: Path):
    """Files that are added or measured may be compressed, as those that are collected; errors name the line."""
    plain, packed = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    plain.write_bytes(GOOD)
    packed.write_bytes(gzip.compress(GOOD))
    assert list(read_documents(packed)) == list(read_documents(plain)) == list(DocumentFiles([packed]))
    packed.write_bytes(gzip.compress(GOOD + b"\n" + GOOD))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:2: id 'a' was already used in line 1"):
        list(read_documents(packed))
