"""Collecting: evidence against declarations, copied passages cut out, duplicates dropped, and all of it listed."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silo.audit import read_findings
from silo.collect import MARGIN_WORDS, collect, without
from silo.corpus import SIDES, Corpus, split_of
from silo.documents import Document
from silo.errors import SiloError, UsageError
from silo.licensing import Policy, Tier

WORDS = [f"word{n}" for n in range(5000)]


def prose(seed: int, length: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def document(id: str, text: str, license: str = "MIT", **more: str) -> dict[str, str]:
    return {"id": id, "text": text, "license": license, "owner": "Ada", **more}


def in_train(prefix: str) -> str:
    """An id that falls to the training split."""
    return next(id for n in range(99) if split_of(id := f"{prefix}{n}") == "train")


def collected(tmp_path: Path, rows: list[dict], name: str = "out", **options) -> Path:
    source = tmp_path / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect([str(source)], tmp_path / name, **options)
    return tmp_path / name


def documents(out: Path, side: str = "permissive") -> dict[str, Document]:
    if not (out / side).exists():
        return {}
    corpus = Corpus.open(out / side)
    return {each.id: each for split in SIDES[side] for each in corpus.documents(split)}


def findings(out: Path) -> dict[str, tuple[str, str]]:
    return {finding.id: (finding.outcome, finding.reason) for finding in read_findings(out)}


def test_a_contradicted_document_is_restricted_and_the_line_is_told(tmp_path: Path):
    """Declared BSD, stated CC-BY-SA: the document goes to the restricted side under both, with the line as evidence."""
    text = "Title\n\n:License: CC By-SA 3.0\n\n" + prose(1, 100)
    out = collected(tmp_path, [document("nep", text, "BSD-3-Clause"), document("b", prose(2, 100))])
    assert documents(out, "restricted")["nep"].license == "(BSD-3-Clause) AND (CC-BY-SA-3.0)"
    assert set(documents(out)) == {"b"}
    (finding,) = read_findings(out)
    assert finding.detail == "BSD-3-Clause is declared; line 3: :License: CC By-SA 3.0"
    assert finding.outcome == "restricted"


def test_a_licence_file_restricts_what_is_beside_it(tmp_path: Path):
    """A GPL licence file, read last, restricts the documents of its directory and below, and of no other source."""
    rows = [
        document("repo:book/a.md", prose(1, 90), source="repo"),
        document("repo:book/part/b.md", prose(2, 90), source="repo"),
        document("repo:code/c.md", prose(3, 90), source="repo"),
        document("other:book/d.md", prose(4, 90), source="other"),
        document("repo:book/LICENSE", "GNU GENERAL PUBLIC LICENSE\nVersion 3", source="repo"),
    ]
    out = collected(tmp_path, rows)
    assert set(documents(out)) == {"repo:code/c.md", "other:book/d.md"}
    assert findings(out)["repo:book/a.md"] == ("restricted", "a file beside it states a stricter licence")
    assert documents(out, "restricted")["repo:book/a.md"].license == "(MIT) AND (GPL-3.0-only)"


def test_a_document_of_nobody_is_named_by_its_file(tmp_path: Path):
    """What says neither owner nor source gets the file's name as its source, wherever the file lies; the rest stays."""
    rows = [
        {"id": "a", "text": prose(1, 90)},
        document("b", prose(2, 90), "GPL-3.0-only"),
        {"id": "c", "text": prose(3, 90), "source": "shelf"},
    ]
    found = []
    for place in (tmp_path, tmp_path / "deeper"):
        place.mkdir(exist_ok=True)
        found.append(collected(place, rows))
        sources = {id: each.source for id, each in documents(found[-1], "restricted").items()}
        assert sources == {"a": "out.jsonl", "b": "", "c": "shelf"}
    assert len({(each / "restricted" / "index.jsonl").read_bytes() for each in found}) == 1


def test_a_licence_file_of_nobody_still_restricts_what_lies_beside_it(tmp_path: Path):
    """The name that a document gets does not part it from the documents that state no source either."""
    notice = {"id": "book/LICENSE", "text": "GNU GENERAL PUBLIC LICENSE\nVersion 3"}
    out = collected(tmp_path, [document("book/a.md", prose(1, 90)), notice])
    assert set(documents(out, "restricted")) == {"book/a.md", "book/LICENSE"}


def test_the_policys_evidence_restricts_a_source(tmp_path: Path):
    """What a policy knows of a source from elsewhere counts as if a file beside the documents said it."""
    policy = Policy(evidence=(("books/*", "CC-BY-NC-4.0", "metadata.yaml: rights: CC BY-NC"),))
    rows = [document("a", prose(1, 90), source="books/emma"), document("b", prose(2, 90), source="manuals")]
    out = collected(tmp_path, rows, policy=policy)
    assert set(documents(out)) == {"b"}
    (finding,) = read_findings(out)
    assert finding.detail == "MIT is declared; metadata.yaml: rights: CC BY-NC"
    ruled = collected(tmp_path, rows, "ruled", policy=Policy(sources=(("books/*", Tier.PD),), evidence=policy.evidence))
    assert set(documents(ruled)) == {"a", "b"}


def test_what_a_policy_refuses_is_nowhere(tmp_path: Path):
    """A refused owner's text is on neither side, is listed, and is cut out of others' text as restricted text is."""
    policy = Policy(owners=(("Grace", Tier.REFUSED),))
    copied, own = prose(1, 100), prose(2, 300)
    rows = [document("g", copied, owner="Grace"), document(in_train("a"), f"{own} {copied}")]
    out = collected(tmp_path, rows, policy=policy)
    assert not (out / "restricted").exists()
    assert findings(out)["g"] == ("refused", "refused by the policy")
    (kept,) = documents(out).values()
    assert kept.text.split() == own.split()[:-MARGIN_WORDS]


@pytest.mark.parametrize("edited", [False, True])
def test_restricted_passages_are_cut_out(tmp_path: Path, edited):
    """A passage of 120 words, as it is or edited, goes with a margin; the rest of the document is kept."""
    restricted = prose(1, 500).split()
    copied = restricted[100:220]
    if edited:
        copied[10::12] = ["instead"] * len(copied[10::12])
    before, after = prose(2, 300), prose(3, 300)
    rows = [
        document("theirs", " ".join(restricted), "GPL-3.0-only"),
        document(in_train("ours"), f"{before} {' '.join(copied)} {after}"),
        document(in_train("clean"), prose(4, 300)),
    ]
    out = collected(tmp_path, rows)
    kept = documents(out)
    assert kept[in_train("clean")].text == prose(4, 300)
    left = kept[in_train("ours")].text
    assert not set(left.split()) & (set(copied) - set(f"{before} {after}".split()))
    first, last = left.split("\n\n")
    assert before.startswith(first)
    assert after.endswith(last)
    assert len(left.split()) > 600 - 2 * (MARGIN_WORDS + 14)
    assert findings(out)[in_train("ours")] == ("cut", "repeats restricted text")
    assert findings(out).keys() == {in_train("ours")}


def test_a_document_of_restricted_text_is_dropped(tmp_path: Path):
    """Where most of a document is copied, or it is a pair, nothing of it is kept."""
    theirs = prose(1, 300)
    mostly, pair = in_train("m"), in_train("p")
    rows = [
        document("theirs", theirs, "CC-BY-SA-4.0"),
        document(mostly, f"{theirs} {prose(2, 100)}"),
        {**document(pair, ""), "prompt": prose(3, 300), "completion": f"{theirs[:900]} {prose(4, 300)}"},
    ]
    del rows[2]["text"]
    out = collected(tmp_path, rows)
    assert documents(out) == {}
    assert findings(out) == dict.fromkeys((mostly, pair), ("refused", "repeats restricted text"))


def test_training_text_does_not_repeat_held_out_text(tmp_path: Path):
    """A training document that holds most of a held-out one loses it; a short common passage does not matter."""
    held = next(id for n in range(99) if split_of(id := f"h{n}") == "test")
    test, own = prose(1, 200), prose(2, 300)
    rows = [
        document(held, test),
        document(in_train("a"), f"{own} {test}"),
        document(in_train("b"), f"{own[::-1]} {test[:400]}"),
    ]
    out = collected(tmp_path, rows)
    kept = documents(out)
    assert kept[held].text == test
    assert kept[in_train("a")].text.split() == own.split()[:-MARGIN_WORDS]
    assert kept[in_train("b")].text == rows[2]["text"]


def test_given_evaluation_text_is_kept_out_and_not_written(tmp_path: Path):
    """Text given with ``against`` is cut out of the permissive side, and stands on no side itself."""
    test, own = prose(1, 200), prose(2, 300)
    against = tmp_path / "eval.jsonl"
    against.write_text(json.dumps(document("x", test, "unknown")) + "\n")
    out = collected(tmp_path, [document(in_train("x"), f"{own} {test}")], against=[str(against)])
    assert not (out / "restricted").exists()
    assert documents(out)[in_train("x")].text.split() == own.split()[:-MARGIN_WORDS]


def test_near_duplicates_go_and_the_held_out_one_stays(tmp_path: Path):
    """Of documents that differ in few words one is kept: the one that is held out, else the first."""
    one = prose(1, 800).split()
    twin = list(one)
    twin[100] = twin[500] = "changed"
    held = next(id for n in range(99) if split_of(id := f"z{n}") == "test")
    for second, kept in ((in_train("b"), in_train("a")), (held, held)):
        rows = [document(in_train("a"), " ".join(one)), document(second, " ".join(twin))]
        out = collected(tmp_path, rows, f"out-{second}")
        assert set(documents(out)) == {kept}


def test_a_licence_is_written_as_it_will_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Blanks around the licence of a source's document, or none at all, leave a corpus that agrees with its index."""
    odd = [
        Document(id="a", text=prose(1, 50), license=" MIT\r"),
        Document(id="b", text=prose(2, 50), license="ours\r"),
        Document(id="c", text=prose(3, 50), license=""),
    ]
    monkeypatch.setattr("silo.collect.open_source", lambda spec, **_: iter(odd))
    collect(["odd"], tmp_path / "out")
    assert {id: each.license for id, each in documents(tmp_path / "out").items()} == {"a": "MIT"}
    restricted = documents(tmp_path / "out", "restricted")
    assert {id: each.license for id, each in restricted.items()} == {"b": "ours", "c": "NOASSERTION"}


def test_pairs_that_were_collected_are_not_drawn_again(tmp_path: Path):
    """A corpus with pairs, collected once more with pairs, has each of them once."""
    function = "def add(a, b):\n    'Add two.'\n    c = a\n    c += b\n    return c\n"
    file = in_train("f")
    one = collected(tmp_path, [document(file, f"'''{prose(1, 200)}'''\n{function}")], "one", pairs=True)
    assert set(documents(one)) == {file, f"{file}#add"}
    collect([str(one / "permissive" / "train.jsonl")], tmp_path / "two", pairs=True)
    assert [row.id for row in Corpus.open(tmp_path / "two" / "permissive").rows] == [file, f"{file}#add"]


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path):
    """The corpus goes where the link leads, and the link stays."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    collected(tmp_path, [document("a", prose(1, 50))], "link")
    assert (tmp_path / "link").is_symlink()
    assert set(documents(tmp_path / "real")) == {"a"}


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory that no rename can replace is refused before a source is read."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(UsageError, match="out is a mount point"):
        collect([str(tmp_path / "no-such-source")], tmp_path / "out")


def test_free_form_licences_are_read(tmp_path: Path):
    """A licence in the words of real metadata is read as SPDX; an unknown one stays as it is, restricted."""
    out = collected(tmp_path, [document("a", prose(1, 50), "Apache 2.0"), document("b", prose(2, 50), "Our own")])
    assert documents(out)["a"].license == "Apache-2.0"
    assert documents(out, "restricted")["b"].license == "Our own"


def test_the_order_of_sources_does_not_matter(tmp_path: Path):
    """Cuts, drops, evidence and duplicates come out the same, to the byte, whatever is read first."""
    theirs = prose(1, 300)
    rows = [
        document("theirs", theirs, "GPL-3.0-only"),
        document("theirs too", theirs + " x", "MPL-2.0"),
        document(in_train("a"), f"{prose(2, 400)} {theirs[:800]} {prose(3, 200)}"),
        document(in_train("b"), prose(4, 600)),
        document(in_train("c"), prose(4, 600) + " more"),
        document("d", "SPDX-License-Identifier: GPL-2.0-only\n" + prose(5, 60)),
    ]
    one, two = collected(tmp_path, rows, "one"), collected(tmp_path, rows[::-1], "two")
    files = [{p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in (one, two)]
    assert files[0] == files[1]
    assert len(findings(one)) == 3


@given(st.lists(st.sampled_from(["a", "bé", "数", "-", "\n", "… "]), min_size=1, max_size=60), st.data())
def test_cutting_leaves_the_other_words(pieces, data):
    """What is left of a text is its words but for those cut, in order."""
    from silo.shingles import word_spans

    text = " ".join(pieces)
    begins, ends = word_spans(text.encode())
    words = [text.encode()[begin:end] for begin, end in zip(begins, ends, strict=True)]
    begin = data.draw(st.integers(0, len(words)))
    end = data.draw(st.integers(begin, len(words)))
    left = without(text, [(begin, end)] if begin < end else []).encode()
    found = [left[begin:end] for begin, end in zip(*word_spans(left), strict=True)]
    assert found == words[:begin] + words[end:]


RECORDS = st.fixed_dictionaries(
    {"id": st.text(min_size=1, max_size=5), "text": st.text(min_size=1, max_size=80)},
    optional={
        "license": st.one_of(
            st.none(), st.text(max_size=20), st.sampled_from(["MIT", "GPL-3.0-only", "CC0-1.0 AND x"])
        ),
        "owner": st.one_of(st.none(), st.text(max_size=5)),
        "source": st.text(max_size=5),
        "title": st.one_of(st.text(max_size=5), st.integers()),
        "prompt": st.text(max_size=5),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=5))
def test_any_records_are_a_corpus_or_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, records):
    """Whatever stands in a record's fields, collecting it works or says why, and frees nothing that is unknown."""
    root = tmp_path_factory.mktemp("fuzz")
    try:
        out = collected(root, records)
    except SiloError:
        assert not (root / "out").exists()
        return
    for each in documents(out).values():
        assert Policy().tier(each).permissive
