"""Collecting: licensed text from any sources becomes a corpus that is whole or absent, in bounded memory.

A document passes five tests on its way. What its licence says, by the policy. What its own text and the files beside it
say (:mod:`silo.evidence`); the stricter wins. Whether the same text is there already. Whether it repeats restricted or
held-out text (:mod:`silo.overlap`): the passages are cut out, or the document is dropped. Whether it nearly repeats
another as a whole. Every refusal, conflict and cut is listed with its evidence, and nothing depends on the order of the
sources.

While sources are read, documents wait in a spool on disk, and what is known of them in a SQLite database beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from silo.audit import Tally, summarize
from silo.corpus import FORMAT, SIDES, split_of
from silo.corpus_writer import HashedFile, SideWriter
from silo.documents import NO_LICENSE, Document, parse_document
from silo.errors import DataError, UsageError
from silo.evidence import claim_of_file, contradiction, directory_of, with_notice
from silo.files import canonical_json, exclusive_lock, sealed, sync_directory, write_json
from silo.findings import CUT, RESTRICTED, STRICTER, Finding
from silo.licensing import DEFAULT_POLICY, Policy, Tier, tier_of
from silo.overlap import SIMILAR, Overlap, Passage, Role, similarity
from silo.pairs import pairs_of
from silo.shingles import word_spans
from silo.sources import open_source, with_source

MARGIN_WORDS = 24
"""Words cut away on both sides of a passage: where its edges were edited, no shingle tells."""
DROPPED_SHARE = 0.5
"""A document of which so much would be cut is dropped whole."""
HELD_OUT_SHARE = 0.5
"""A document that repeats so much of a held-out one, or of itself from held-out ones, would teach the test."""
LEAST_WORDS = 20
"""A document that would have fewer words left is dropped whole."""

_BATCH_BYTES = 1 << 20
"""Text that is hashed at once: what fits the processor's cache."""
_ORDER = {"test": 0, "val": 1, "control": 2, "train": 3}
"""Of near-duplicates the one in the split that comes first here is kept, so that none is left on both sides."""
_TIERS = list(Tier)

Progress = Callable[[str, int], None]
"""Called with a source, or what is being done, and the number of documents done so far."""


def collect(
    sources: list[str],
    out: Path,
    *,
    policy: Policy = DEFAULT_POLICY,
    pairs: bool = False,
    against: Iterable[str] = (),
    downloads: Path | None = None,
    recipe: Path | None = None,
    diversify: tuple[Path, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read sources, sort their documents by tier, and write a corpus that is whole or absent.

    A text that occurs twice is kept once, under the smallest id; one that occurs both permissive and restricted is
    restricted.

    Args:
        sources: what :func:`silo.sources.open_source` reads.
        out: a directory that does not exist yet, or is empty.
        policy: overrides of the licence tables, and evidence from elsewhere.
        pairs: whether to add text pairs drawn from the permissive Python files.
        against: sources of evaluation text. It is kept out of the permissive side, and not written.
        downloads: where archives from PyPI are kept.
        recipe: how to read rows; see :mod:`silo.hub`.
        diversify: a model's directory, and the share of training documents to keep; see :mod:`silo.diversify`.
        progress: told of each document read.

    Returns:
        The audit's summary, as in ``audit.json``.

    Raises:
        UsageError: ``out`` holds something, or is a mount point; or there is no such source.
        DataError: a source is broken, an id comes twice, or nothing was left to keep.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory; choose another --out, or delete it")
    # A rename would not follow a link to a directory, and cannot take a mount point's place.
    target = Path(os.path.realpath(out))
    if target.is_mount():
        raise UsageError(f"{out} is a mount point, expected a directory that can be made anew; choose one inside it")
    with _made(target) as partial:
        work = partial / "work"
        work.mkdir()
        with contextlib.closing(Catalogue(work, policy, progress)) as catalogue:
            read = functools.partial(open_source, downloads=downloads, findings=catalogue.note, recipe=recipe)
            for spec in against:
                catalogue.read(spec, read(spec), evaluation=True)
            for spec in sources:
                catalogue.read(spec, read(spec))
            catalogue.require_some(sources)
            catalogue.sift()
            if diversify is not None:
                catalogue.diversify(*diversify)
            summary = _write(partial, catalogue, policy, pairs)
        shutil.rmtree(work)
    return summary


@contextlib.contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A directory to work in, which takes its name when all went well, and is gone if not."""
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial / "lock"
    with exclusive_lock(lock):
        try:
            _clear(partial, keep=lock)  # what a killed run left
            yield partial
            lock.unlink()
            sync_directory(partial)
            os.replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync_directory(out.parent)


def _clear(directory: Path, *, keep: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


class Catalogue:
    """Everything that was read, on disk: texts in a spool, and one row a document in a database."""

    def __init__(self, directory: Path, policy: Policy, progress: Progress | None = None) -> None:
        self._policy, self._progress = policy, progress or (lambda what, documents: None)
        self._spool = open(directory / "spool", "w+b")  # noqa: SIM115 - closed by close()
        self._overlap = Overlap(directory / "overlap")
        self._batch: list[bytes] = []
        self._batched = self._count = 0
        self._database = sqlite3.connect(directory / "catalogue", isolation_level=None)
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT UNIQUE, tier INT, license TEXT, owner TEXT,
                source TEXT, content TEXT, is_pair INT, offset INT, bytes INT, kept INT, spec TEXT, stated TEXT);
            CREATE TABLE claims (source TEXT, directory TEXT, license TEXT, evidence TEXT);
            CREATE TABLE findings (id TEXT, reason TEXT, detail TEXT, outcome TEXT);
            CREATE TABLE cuts (number INT, begin INT, end INT);
            CREATE TABLE pairs (content TEXT PRIMARY KEY) WITHOUT ROWID;
            BEGIN;
            """
        )

    def close(self) -> None:
        """Let go of the files; they are scratch, and their owner deletes them."""
        self._database.close()
        self._spool.close()

    # --- reading ------------------------------------------------------------------------------------------------------

    def note(self, finding: Finding) -> None:
        """Keep what was found for the audit."""
        # The name of a file may be no Unicode, which is what the database takes.
        fields = [each.encode(errors="backslashreplace").decode() for each in dataclasses.astuple(finding)]
        self._database.execute("INSERT INTO findings VALUES (?, ?, ?, ?)", fields)

    def read(self, spec: str, documents: Iterator[Document], *, evaluation: bool = False) -> None:
        """Take in a source. Evaluation text is compared with the rest, and never written."""
        for number, document in enumerate(documents, start=1):
            claim = claim_of_file(document)
            if claim is not None:
                evidence = f"{document.id}:{claim.line}: {claim.text}"
                row = (document.source, directory_of(document), claim.license, evidence)
                self._database.execute("INSERT INTO claims VALUES (?, ?, ?, ?)", row)
            stated = document.source
            if not evaluation:
                document = self._believed(with_source(document, spec))
            self._insert(spec, number, document, stated, evaluation)
            self._progress(spec, number)

    def _believed(self, document: Document) -> Document:
        """The document under the licence that it states itself, where that is stricter than the declared one."""
        license = self._policy.read_license(document.license.strip()) or NO_LICENSE  # as it will be read again
        document = replace(document, license=license)
        found = contradiction(document, self._policy)
        if found is None:
            return document
        believed = with_notice(document, found)
        detail = f"{document.license} is declared; line {found.line}: {found.text}"
        self._note_stricter(document.id, believed, "its own text states a stricter licence", detail)
        return believed

    def _note_stricter(self, id: str, believed: Any, reason: str, detail: str) -> None:
        outcome = STRICTER if self._policy.tier(believed).permissive else RESTRICTED
        self.note(Finding(id, reason, detail, outcome))

    def _insert(self, spec: str, number: int, document: Document, stated: str, evaluation: bool) -> None:
        try:
            line = canonical_json(document.to_json())
        except UnicodeEncodeError as error:
            raise DataError(f"{spec}: document {number} is not valid Unicode ({error.reason}); mend it") from None
        tier = _TIERS.index(self._policy.tier(document))
        id = f"{spec}\n{document.id}" if evaluation else document.id  # the same file may be a source as well
        offset = self._spool.tell()
        row = (self._count, id, tier, document.license, document.owner, document.source, document.content_hash)
        place = (bool(document.prompt), offset, self._spool.write(line), None if evaluation else 1, spec, stated)
        try:
            self._database.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row + place)
        except sqlite3.IntegrityError:
            where = self._database.execute("SELECT stated, spec FROM documents WHERE id = ?", (id,)).fetchone()
            first = where[0] or where[1]
            raise DataError(
                f"{spec}: id {document.id!r} was already used by {first}; ids are unique in a corpus"
            ) from None
        self._count += 1
        self._batch.append(document.full_text.encode())
        self._batched += len(self._batch[-1])
        if self._batched >= _BATCH_BYTES:
            self._shingle()

    def _shingle(self) -> None:
        if self._batch:
            self._overlap.add(self._batch)
        self._batch, self._batched = [], 0

    def require_some(self, sources: list[str]) -> None:
        """Raise :class:`DataError` unless the sources gave a document."""
        if self._value("SELECT count(*) FROM documents WHERE kept"):
            return
        reasons = self._database.execute("SELECT reason, count(*) FROM findings GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 3")
        told = "; ".join(f"{count} refused: {reason}" for reason, count in reasons)
        raise DataError(
            f"{', '.join(sources)}: no document came of it{f' ({told})' if told else ''}; expected one or more"
        )

    # --- sifting ------------------------------------------------------------------------------------------------------

    def sift(self) -> None:
        """Apply all that can be judged only when everything is there."""
        self._shingle()
        self._apply_claims()
        self._refuse_by_policy()
        self._drop_duplicates()
        self._compare()

    def _apply_claims(self) -> None:
        """Hold documents against the licence files beside them, and against the evidence that the policy brings."""
        claims = self._database.execute("SELECT DISTINCT source, directory, license, evidence FROM claims ORDER BY 4")
        for source, directory, license, evidence in claims.fetchall():
            chosen = "stated = ? AND substr(id, 1, ?) = ?", (source, len(directory), directory)
            self._hold_against(chosen, license, "a file beside it states a stricter licence", evidence)
        for pattern, license, where in self._policy.evidence:
            glob = pattern.replace("[", "[[]")
            self._hold_against(("source GLOB ?", (glob,)), license, "the policy's evidence is stricter", where)

    def _hold_against(self, chosen: tuple[str, tuple[Any, ...]], license: str, reason: str, detail: str) -> None:
        where, values = chosen
        rows = self._database.execute(
            f"SELECT number, id, license, owner, source, tier FROM documents WHERE kept AND {where} ORDER BY id", values
        ).fetchall()
        for number, id, declared, owner, source, tier in rows:
            claimed = _TIERS.index(tier_of(license, self._policy))
            if claimed <= tier or not _TIERS[tier].permissive:
                continue
            both = f"({declared}) AND ({license})"
            believed = Document(id=id, text="-", license=both, owner=owner, source=source)
            now = _TIERS.index(self._policy.tier(believed))
            self._database.execute("UPDATE documents SET license = ?, tier = ? WHERE number = ?", (both, now, number))
            self._note_stricter(id, believed, reason, f"{declared} is declared; {detail}")

    def _refuse_by_policy(self) -> None:
        refused = _TIERS.index(Tier.REFUSED)
        for number, id, license in self._all("number, id, license", f"kept AND tier = {refused}"):
            self._refuse(number, Finding(id, "refused by the policy", license))

    def _drop_duplicates(self) -> None:
        """Keep one document of each text: the first in a restricted tier if there is one, else the first."""
        restricted = _TIERS.index(Tier.RESTRICTED)
        same = self._database.execute(
            f"""SELECT number, id, tier, license, content FROM documents
            WHERE content IN (SELECT content FROM documents WHERE kept GROUP BY content HAVING count(*) > 1) AND kept
            ORDER BY content, tier < {restricted}, id"""
        ).fetchall()
        first = None
        for number, id, tier, license, content in same:
            if first is None or first[4] != content:
                first = (number, id, tier, license, content)
                continue
            laundered = tier < restricted <= first[2]
            reason = "restricted elsewhere: the same text" if laundered else "a duplicate: the same text"
            self._refuse(number, Finding(id, reason, f"{first[1]} ({first[3]})"))

    def _compare(self) -> None:
        """Find copied passages and near-duplicates."""
        roles, ranks = np.zeros(self._count, dtype=np.uint8), np.zeros(self._count, dtype=np.uint32)
        restricted = _TIERS.index(Tier.RESTRICTED)
        self._database.create_function("place", 2, self._place, deterministic=True)
        order = self._database.execute("SELECT number, id, tier, kept FROM documents ORDER BY place(id, kept), id")
        for rank, (number, id, tier, kept) in enumerate(order):
            ranks[number] = rank
            if kept is None:
                roles[number] = Role.EVALUATION
            elif tier >= restricted:
                roles[number] = Role.RESTRICTED
            elif kept:
                roles[number] = Role.TRAINING if split_of(id) == "train" else Role.EVALUATION
        self._overlap.compare(roles, ranks)
        words = self._overlap.words
        for number, passages in self._overlap.passages():
            if self._kept(number):
                self._cut(number, int(words[number]), [p for p in passages if self._counts(p, words, number)])
        for number, other in self._overlap.similar():
            if self._kept(number):
                self._drop_near_duplicate(number, other)

    @staticmethod
    def _place(id: str, kept: int | None) -> int:
        return -1 if kept is None else _ORDER[split_of(id)]

    def _counts(self, passage: Passage, words: np.ndarray, number: int) -> bool:
        """Whether a passage must go: any restricted one; a held-out one if much of either text is in it."""
        if passage.kind == Role.RESTRICTED:
            return True
        least = min(int(words[number]), int(words[passage.other]))
        return passage.end - passage.begin >= HELD_OUT_SHARE * least

    def _cut(self, number: int, words: int, passages: list[Passage]) -> None:
        if not passages:
            return
        spans = _merged([(max(0, p.begin - MARGIN_WORDS), min(words, p.end + MARGIN_WORDS)) for p in passages])
        gone = sum(end - begin for begin, end in spans)
        worst = max(passages, key=lambda passage: (passage.kind == Role.RESTRICTED, passage.words, -passage.begin))
        id, is_pair = self._one("id, is_pair", number)
        theirs, license = self._one("id, license", worst.other)
        kind = "restricted" if worst.kind == Role.RESTRICTED else "held-out"
        spelt = theirs.partition("\n")[2] or theirs
        detail = f"{worst.words} of its words {worst.begin} to {worst.end} are those of {spelt} ({license})"
        if is_pair or gone >= DROPPED_SHARE * words or words - gone < LEAST_WORDS:
            self._refuse(number, Finding(id, f"repeats {kind} text", detail))
            return
        self._database.executemany("INSERT INTO cuts VALUES (?, ?, ?)", [(number, *span) for span in spans])
        self.note(Finding(id, f"repeats {kind} text", f"{gone} of {words} words cut; {detail}", CUT))

    def _drop_near_duplicate(self, number: int, other: int) -> None:
        found = similarity(*(self._text(one).encode() for one in (number, other)))
        if found >= SIMILAR:
            id, theirs = self._one("id", number)[0], self._one("id", other)[0].rpartition("\n")[2]
            self._refuse(number, Finding(id, "a near-duplicate", f"{found:.0%} of the shingles of both: {theirs}"))

    def diversify(self, model: Path, keep: float) -> None:
        """Drop the permissive training documents that say what others say, by a model's own keys.

        An embedding is the mean key over the first window of a document.
        """
        from silo.diversify import redundant
        from silo.language_model import LanguageModel

        lm = LanguageModel.load(model)
        restricted = _TIERS.index(Tier.RESTRICTED)
        where = f"kept AND NOT is_pair AND tier < {restricted} ORDER BY id"
        chosen = [(n, id) for n, id in self._all("number, id", where) if split_of(id) == "train"]
        path = Path(self._spool.name).with_name("embeddings")
        shape = (len(chosen), lm.key_spec.dimension)
        if not chosen:
            return
        embeddings = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
        for place, (number, _) in enumerate(chosen):
            document = self._document(*self._one("offset, bytes", number))
            embeddings[place] = lm.keys(lm.tokenize(document)[: lm.key_spec.context]).mean(axis=0)
            self._progress("diversify", place + 1)
        for each in redundant(embeddings, keep):
            number, id = chosen[each.index]
            like = "its cluster" if each.other is None else chosen[each.other][1]
            self._refuse(
                number, Finding(id, "redundant: says what others say", f"cosine {each.similarity:.3f} to {like}")
            )

    def _refuse(self, number: int, finding: Finding) -> None:
        self._database.execute("UPDATE documents SET kept = 0 WHERE number = ?", (number,))
        self.note(finding)

    # --- giving out ---------------------------------------------------------------------------------------------------

    def kept(self, *, permissive: bool) -> Iterator[tuple[Document, bytes | None]]:
        """The documents of one side, by id, with copied passages cut out; and the line of one that did not change."""
        sign = "<" if permissive else ">="
        where = f"kept AND tier {sign} {_TIERS.index(Tier.RESTRICTED)} ORDER BY id"
        cut = "SELECT begin, end FROM cuts WHERE number = ? ORDER BY 1"
        for number, license, offset, length in self._all("number, license, offset, bytes", where):
            self._spool.seek(offset)
            line = self._spool.read(length)
            document = parse_document(line, where="the spool")
            cuts = self._database.execute(cut, (number,)).fetchall()
            if not cuts and document.license == license:
                yield document, line
            else:
                yield replace(document, license=license, text=without(document.text, cuts)), None

    def is_new(self, pair: Document) -> bool:
        """Whether no document has its id, as a pair that was collected before has, and no pair of the same text was
        asked for before."""
        if self._database.execute("SELECT 1 FROM documents WHERE id = ?", (pair.id,)).fetchone():
            return False
        return self._database.execute("INSERT OR IGNORE INTO pairs VALUES (?)", (pair.content_hash,)).rowcount == 1

    def findings(self) -> Iterator[Finding]:
        """All that was found, sorted."""
        order = self._database.execute(
            "SELECT id, reason, detail, outcome FROM findings ORDER BY outcome, reason, id, detail"
        )
        return (Finding(*row) for row in order)

    def _document(self, offset: int, length: int) -> Document:
        self._spool.seek(offset)
        return parse_document(self._spool.read(length), where="the spool")

    def _text(self, number: int) -> str:
        return self._document(*self._one("offset, bytes", number)).full_text

    def _kept(self, number: int) -> bool:
        return bool(self._one("kept", number)[0])

    def _one(self, columns: str, number: int) -> Any:
        return self._database.execute(f"SELECT {columns} FROM documents WHERE number = ?", (number,)).fetchone()

    def _all(self, columns: str, where: str) -> Iterator[Any]:
        """Rows of documents, in pieces, so that others can be asked for and changed in between."""
        cursor = self._database.execute(f"SELECT {columns} FROM documents WHERE {where}")
        while rows := cursor.fetchmany(1000):
            yield from rows

    def _value(self, query: str) -> Any:
        return self._database.execute(query).fetchone()[0]


def without(text: str, cuts: list[tuple[int, int]]) -> str:
    """A text without some runs of its words, each given as (begin, end); an empty line stands where one was."""
    if not cuts:
        return text
    data, pieces, at = text.encode(), [], 0
    begins, ends = word_spans(data)
    for begin, end in cuts:
        pieces.append(data[at : begins[begin]])
        at = int(ends[end - 1])
    pieces.append(data[at:])
    return "\n\n".join(piece.decode().strip() for piece in pieces if piece.strip())


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without overlap, in order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(root: Path, catalogue: Catalogue, policy: Policy, pairs: bool) -> dict[str, Any]:
    """Write both sides, then the audit, then the manifests, which vouch for both."""
    tally = Tally(policy)
    writers = {}
    for side in SIDES:
        writer = None
        for document, line in catalogue.kept(permissive=side == "permissive"):
            writer = writers[side] = writer or SideWriter(root / side, side, policy, tally)
            writer.write(document, line)
            for pair in pairs_of(document) if pairs and side == "permissive" else ():
                if catalogue.is_new(pair):
                    writer.write(pair)
    findings = HashedFile(root / "findings.jsonl")
    for finding in catalogue.findings():
        findings.write(canonical_json(dataclasses.asdict(finding)))
    summary = summarize(tally, catalogue.findings())
    audit = sealed({"format": FORMAT, **summary, "findings": {"sha256": findings.close(), "bytes": findings.bytes}})
    write_json(root / "audit.json", audit)
    for writer in writers.values():
        writer.close(audit["digest"])
    return summary
