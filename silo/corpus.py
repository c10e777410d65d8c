"""A corpus on disk: permissive and restricted text in two directories, each with an index that carries no text.

    OUT/audit.json                        what was kept and what was refused, and why
    OUT/permissive/  OUT/restricted/      manifest.json  index.jsonl  train.jsonl  val.jsonl  test.jsonl
    OUT/permissive/                       control.jsonl

The index holds one row a document: its licence, its owner, and where its line lies. So the trainer's gate can refuse a
document before the first byte of any text is read, and the weights' side never has to open the other directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from silo.documents import Document, parse_document
from silo.errors import DataError, IntegrityError, LicenseError, UsageError
from silo.files import canonical_json, exclusive_lock, read_checked, read_json, sha256, sync_directory, write_json
from silo.licensing import DEFAULT_POLICY, Policy, Tier
from silo.pairs import pairs_of
from silo.sources import Refusal, open_source

FORMAT = 1
SIDES = {"permissive": ("train", "val", "test", "control"), "restricted": ("train", "val", "test")}
"""Side → its splits. Control is permissive text that the weights did not train on, for the store's control plane."""

_EXAMPLES = 5
"""Refusals that a summary shows of each reason; ``audit.json`` lists them all."""

_TOKENIZER_BATCH = 256
"""Documents encoded at once, which the tokenizer spreads over the processor's cores."""

Progress = Callable[[str, int], None]
"""Called with a source and the number of documents read from it so far."""


def split_of(id: str, side: str = "permissive") -> str:
    """The split of a document: 10 % test, 10 % val, 10 % control (permissive side only), the rest train.

    It hangs on the id alone, up to the first ``#``: a pair follows its file, and adding documents moves none.
    """
    tenth = int(sha256(id.partition("#")[0].encode())[:8], 16) * 10 >> 32
    split = ("test", "val", "control")[tenth] if tenth < 3 else "train"
    return split if split in SIDES[side] else "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One document of a corpus, without its text."""

    id: str
    license: str
    owner: str
    source: str
    title: str
    tier: str
    """What the collector found. For people: the gate works it out again from the licence."""
    split: str
    offset: int
    """Where the document's line begins in ``<split>.jsonl``, in bytes."""
    bytes: int
    sha256: str
    """Of the line."""
    content: str
    """The document's :attr:`~silo.documents.Document.content_hash`."""


# --- collecting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A document in the spool, where it waits until all sources are read."""

    id: str
    tier: Tier
    license: str
    source: str
    content: str
    offset: int
    bytes: int


def collect(
    sources: list[str],
    out: Path,
    *,
    policy: Policy = DEFAULT_POLICY,
    pairs: bool = False,
    downloads: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read sources, sort their documents by tier, and write a corpus that is whole or absent.

    A text that occurs twice is kept once, under the smallest id; one that occurs both permissive and restricted is
    restricted. Nothing depends on the order of the sources.

    Args:
        sources: what :func:`silo.sources.open_source` reads.
        out: a directory that does not exist yet, or is empty.
        policy: overrides of the licence tables.
        pairs: whether to add text pairs drawn from the permissive Python files.
        downloads: where archives from PyPI are kept.
        progress: told of each document read.

    Returns:
        The audit's summary, as in ``audit.json``.

    Raises:
        UsageError: ``out`` holds something, or there is no such source.
        DataError: a source is broken, an id comes twice, or nothing was left to keep.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory; choose another --out, or delete it")
    out = Path(os.path.abspath(out))
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial / "lock"
    with exclusive_lock(lock):
        try:
            _clear(partial, keep=lock)  # what a killed run left
            refusals: list[Refusal] = []
            with open(partial / "spool", "w+b") as spool:
                entries = _read_sources(sources, spool, policy, downloads, refusals, progress)
                kept = _resolve(entries, refusals)
                _write_sides(partial, kept, spool, policy, pairs)
            (partial / "spool").unlink()
            summary = _write_audit(partial, refusals)
            lock.unlink()
            sync_directory(partial)
            os.replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync_directory(out.parent)
    return summary


def _clear(directory: Path, *, keep: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _read_sources(
    sources: list[str],
    spool: BinaryIO,
    policy: Policy,
    downloads: Path | None,
    refusals: list[Refusal],
    progress: Progress | None,
) -> list[_Entry]:
    """Write every document's line to the spool, and return where it lies and what it may be used for."""
    entries: dict[str, _Entry] = {}
    for spec in sources:
        for number, document in enumerate(open_source(spec, downloads=downloads, refusals=refusals), start=1):
            if document.id in entries:
                first = entries[document.id].source or "an earlier source"
                raise DataError(f"{spec}: id {document.id!r} was already used by {first}; ids are unique in a corpus")
            try:
                line = canonical_json(document.to_json())
            except UnicodeEncodeError as error:
                raise DataError(f"{spec}: document {number} is not valid Unicode ({error.reason}); mend it") from None
            tier, content = policy.tier(document), document.content_hash
            source = document.source or spec
            entries[document.id] = _Entry(
                document.id, tier, document.license, source, content, spool.tell(), spool.write(line)
            )
            if progress is not None:
                progress(spec, number)
    if not entries:
        reasons = Counter(refusal.reason for refusal in refusals).most_common(3)
        told = "; ".join(f"{count} refused: {reason}" for reason, count in reasons)
        raise DataError(
            f"{', '.join(sources)}: no document came of it{f' ({told})' if told else ''}; expected one or more"
        )
    return sorted(entries.values(), key=lambda entry: entry.id)


def _resolve(entries: Iterable[_Entry], refusals: list[Refusal]) -> list[_Entry]:
    """Keep one document of each text: the first in a restricted tier if there is one, else the first."""
    kept: dict[str, _Entry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.tier.permissive, entry.id)):
        first = kept.setdefault(entry.content, entry)
        if first is not entry:
            laundered = entry.tier.permissive and not first.tier.permissive
            reason = "restricted elsewhere: the same text" if laundered else "a duplicate: the same text"
            refusals.append(Refusal(entry.id, reason, f"{first.id} ({first.license})"))
    return sorted(kept.values(), key=lambda entry: entry.id)


def _write_sides(root: Path, entries: list[_Entry], spool: BinaryIO, policy: Policy, pairs: bool) -> None:
    for side in SIDES:
        chosen = [entry for entry in entries if entry.tier.permissive == (side == "permissive")]
        if not chosen:
            continue
        writer = _SideWriter(root / side, side, policy)
        seen: set[str] = set()
        for entry in chosen:
            spool.seek(entry.offset)
            document = parse_document(spool.read(entry.bytes), where=entry.id)
            writer.write(document)
            for pair in pairs_of(document) if pairs and side == "permissive" else ():
                if pair.content_hash not in seen:
                    seen.add(pair.content_hash)
                    writer.write(pair)
        writer.close()


class _SideWriter:
    """Writes the files of one side as a stream, and its manifest last."""

    def __init__(self, directory: Path, side: str, policy: Policy) -> None:
        directory.mkdir()
        self._directory, self._side, self._policy = directory, side, policy
        self._files = {name: _HashedFile(directory / name) for name in _file_names(side)}
        self._counts: Counter[str] = Counter()

    def write(self, document: Document) -> None:
        """Append a document's line to its split, and its row to the index."""
        split = split_of(document.id, self._side)
        line = canonical_json(document.to_json())
        file = self._files[f"{split}.jsonl"]
        row = Row(
            id=document.id,
            license=document.license,
            owner=document.owner,
            source=document.source,
            title=document.title,
            tier=self._policy.tier(document).value,
            split=split,
            offset=file.bytes,
            bytes=len(line),
            sha256=sha256(line),
            content=document.content_hash,
        )
        file.write(line)
        self._files["index.jsonl"].write(canonical_json(dataclasses.asdict(row)))
        self._counts.update({"pairs" if _is_drawn_pair(document) else "documents": 1, split: 1})

    def close(self) -> None:
        """Sync the files and write the manifest, which vouches for them all."""
        files = {name: {"sha256": file.close(), "bytes": file.bytes} for name, file in self._files.items()}
        manifest = {
            "format": FORMAT,
            "side": self._side,
            "policy": self._policy.to_json(),
            "policy_fingerprint": self._policy.fingerprint,
            "counts": {name: self._counts[name] for name in ("documents", "pairs", *SIDES[self._side])},
            "files": files,
        }
        write_json(self._directory / "manifest.json", _sealed(manifest))
        sync_directory(self._directory)


def _is_drawn_pair(document: Document) -> bool:
    """Whether a document was drawn from another, and is no text of its own: a user's own pairs have no file."""
    return bool(document.prompt) and "#" in document.id


def _file_names(side: str) -> list[str]:
    return ["index.jsonl", *(f"{split}.jsonl" for split in SIDES[side])]


class _HashedFile:
    """A file written once, from front to back, whose digest is known when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close(), which makes it durable first
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> str:
        """Make the bytes durable and return their SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its own digest in it, so that it vouches for itself."""
    return {**record, "digest": sha256(canonical_json(record))}


def _read_sealed(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or _sealed({k: v for k, v in record.items() if k != "digest"}) != record:
        raise IntegrityError(f"{path} is damaged: it does not have the digest that it states; collect the corpus again")
    if record.get("format") != FORMAT:
        raise DataError(f"{path} has format {record.get('format')!r}, this version reads {FORMAT}; collect again")
    return record


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Corpus:
    """One side of a corpus, opened: its index is read and checked, its text is not."""

    path: Path
    manifest: dict[str, Any]
    rows: tuple[Row, ...]

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Open the directory of one side.

        Raises:
            UsageError: there is no corpus here, or this is the directory above both sides.
            IntegrityError: manifest and index do not agree, or a file does not have the promised size.
        """
        _require_corpus(path)
        manifest = _read_sealed(path / "manifest.json")
        index = path / "index.jsonl"
        lines = read_checked(index, manifest["files"]["index.jsonl"]["sha256"]).splitlines()
        try:
            rows = tuple(Row(**json.loads(line)) for line in lines)
        except (TypeError, ValueError) as error:
            raise IntegrityError(f"{index} has a row that is none ({error}); collect the corpus again") from None
        found = dict(Counter(row.split for row in rows))
        wanted = {split: manifest["counts"][split] for split in SIDES[manifest["side"]] if manifest["counts"][split]}
        if found != wanted:
            raise IntegrityError(f"{index} has rows {found}, the manifest says {wanted}; collect the corpus again")
        for name, file in manifest["files"].items():
            if not (path / name).is_file():
                raise IntegrityError(f"{path / name} is missing; restore it from a backup or collect the corpus again")
            size = (path / name).stat().st_size
            if size != file["bytes"]:
                raise IntegrityError(f"{path / name} is damaged: {size} bytes, the manifest says {file['bytes']}")
        return cls(path, manifest, rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, and through its checksums of all the corpus."""
        return str(self.manifest["digest"])

    def require_permissive(self, policy: Policy = DEFAULT_POLICY) -> None:
        """The gate: raise :class:`LicenseError` at the first document that the policy holds back.

        The tier is worked out from licence, owner and source here and now. The ``tier`` that the index states, and the
        name of the directory, are what someone else thought at another time.
        """
        for row in self.rows:
            if not policy.tier(row).permissive:
                raise LicenseError(
                    f"{self.path}: document {row.id!r} is under {row.license!r}, which is restricted; weights learn "
                    "from permissive text only: leave it out, put it into a datastore, or name it in a policy file"
                )

    def documents(self, split: str) -> Iterator[Document]:
        """Read the documents of a split, in the order of the file, each line checked against the index.

        Raises:
            UsageError: this side has no such split.
            IntegrityError: a line is not the one that the index describes; file and document are named.
        """
        if split not in SIDES[self.manifest["side"]]:
            splits = ", ".join(SIDES[self.manifest["side"]])
            raise UsageError(f"{self.path} has no split {split!r}; expected one of {splits}")
        path = self.path / f"{split}.jsonl"
        with open(path, "rb") as file:
            for row in self.rows:
                if row.split == split:
                    file.seek(row.offset)
                    yield _checked_document(file.read(row.bytes), row, path)


def _checked_document(line: bytes, row: Row, path: Path) -> Document:
    if sha256(line) != row.sha256:
        raise IntegrityError(f"{path} is damaged at document {row.id!r}; restore it from a backup or collect it again")
    document = parse_document(line, where=f"{path} at byte {row.offset}")
    for name in ("id", "license", "owner", "source", "title"):
        if getattr(document, name) != getattr(row, name):
            found, wanted = getattr(document, name), getattr(row, name)
            raise IntegrityError(f"{path}: document {row.id!r} has {name} {found!r}, the index says {wanted!r}")
    return document


def _require_corpus(path: Path) -> None:
    if (path / "manifest.json").is_file():
        return
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; expected a corpus that `silo corpus collect` wrote")
    sides = [f"{path / side}" for side in SIDES if (path / side / "manifest.json").is_file()]
    if sides:
        raise UsageError(f"{path} holds the sides of a corpus; use {' or '.join(sides)}")
    raise UsageError(f"{path} is not a corpus: it has no manifest.json; expected what `silo corpus collect` wrote")


# --- auditing ---------------------------------------------------------------------------------------------------------


def audit(path: Path, tokenizer: Any = None) -> dict[str, Any]:
    """What a corpus holds, by tier and licence, read from its text with every checksum checked; and what was refused.

    Args:
        path: what :func:`collect` wrote, or one side of it.
        tokenizer: a ``tokenizers.Tokenizer``, to count tokens as well.
    """
    sides = [path / side for side in SIDES if (path / side / "manifest.json").is_file()]
    table = []
    for corpus in [Corpus.open(side) for side in sides or [path]]:
        table += _tier_table(corpus, tokenizer)
    refusals = _read_sealed(path / "audit.json")["refusals"] if sides else []
    return _summary(table, [Refusal(**refusal) for refusal in refusals])


def _write_audit(root: Path, refusals: list[Refusal]) -> dict[str, Any]:
    refusals.sort(key=lambda refusal: (refusal.reason, refusal.id))
    corpora = [Corpus.open(root / side) for side in SIDES if (root / side).is_dir()]
    summary = _summary([line for corpus in corpora for line in _tier_table(corpus, None)], refusals)
    listed = [dataclasses.asdict(refusal) for refusal in refusals]
    write_json(root / "audit.json", _sealed({"format": FORMAT, **summary, "refusals": listed}))
    return summary


def _tier_table(corpus: Corpus, tokenizer: Any) -> list[dict[str, Any]]:
    """One line a tier and licence. Drawn pairs are counted apart, and their text not again."""
    policy = Policy.from_json(corpus.manifest["policy"], where=str(corpus.path))
    counts: dict[tuple[Tier, str], Counter[str]] = {}
    owners: dict[tuple[Tier, str], set[str]] = {}
    for split in SIDES[corpus.manifest["side"]]:
        stream = corpus.documents(split)
        while documents := list(itertools.islice(stream, _TOKENIZER_BATCH)):
            texts = ["" if _is_drawn_pair(document) else document.full_text for document in documents]
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False) if tokenizer is not None else texts
            for document, text, tokens in zip(documents, texts, encoded, strict=True):
                key = (policy.tier(document), document.license)
                owners.setdefault(key, set()).add(document.owner)
                kind = "pairs" if _is_drawn_pair(document) else "documents"
                count = counts.setdefault(key, Counter())
                count.update({kind: 1, "characters": len(text)})
                if tokenizer is not None:
                    count["tokens"] += len(tokens.ids)
    names = ["documents", "pairs", "characters"] + (["tokens"] if tokenizer is not None else [])
    return [
        {"tier": tier.value, "license": license, **{name: counts[tier, license][name] for name in names}}
        | {"owners": sorted(owners[tier, license])}
        for tier, license in sorted(counts)
    ]


def _summary(table: list[dict[str, Any]], refusals: list[Refusal]) -> dict[str, Any]:
    grouped: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        grouped.setdefault(refusal.reason, []).append(refusal)
    names = [name for name in ("documents", "pairs", "characters", "tokens") if table and name in table[0]]
    totals = {
        tier.value: {name: sum(line[name] for line in table if line["tier"] == tier.value) for name in names}
        for tier in Tier
    }
    return {
        "licenses": table,
        "tiers": totals,
        "refused": [
            {
                "reason": reason,
                "documents": len(group),
                "examples": [{"id": refusal.id, "detail": refusal.detail} for refusal in group[:_EXAMPLES]],
            }
            for reason, group in sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0]))
        ],
    }
