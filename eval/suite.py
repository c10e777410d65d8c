"""Suites: which models are measured on which text, with which methods, in a file that says all of it.

    name: mine
    version: 1
    tokens: 20000                     # of each domain's test text; all of it if absent
    fit_tokens: 10000                 # of each domain's validation text
    protocol: {kind: stream, context: 1024, stride: 512}    # SILO's; if absent, each document as a store reads it
    models:
      permissive: {path: model, store: store, use: [lm, knn, ngram], nearest: {k: 1024, probes: 16}}
      everything: {path: reference}
    reference: everything             # the model that the gap is measured to
    domains:
      paramiko:
        test: {source: corpus/restricted, split: test, owner: Jeff Forcier}
        validation: {source: corpus/restricted, split: val, owner: Jeff Forcier}
      others: {by_owner: true, test: {…}, validation: {…}}    # one domain for each owner in it

A source is what `silo corpus collect` takes, or a side of a corpus. Paths are relative to the directory that the suite
is run in. The file's hash and those of models, stores and texts are part of every result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from eval.protocols import Protocol
from silo.config import build, load_config
from silo.corpus import Corpus, split_of
from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.files import canonical_json, sha256
from silo.hub import hub_documents, load_recipe
from silo.nearest import Nearest
from silo.sources import open_source
from silo.weights import METHODS

SUITES = Path(__file__).with_name("suites")


@dataclass(frozen=True)
class Data:
    """Some documents of a source."""

    source: str
    """What `silo corpus collect` takes, or the directory of one side of a corpus. ``hf:./DIR`` is a local folder, read
    as a data set of the hub is. Packages of PyPI are looked for in ``downloads`` of the base, and put there."""
    split: str | None = None
    """Of a corpus, its file; of any other source, the documents whose ids put them there (10 % test, 10 % val)."""
    owner: str | None = None
    """Only this owner's."""
    of: str | None = None
    """Only those whose ``source`` is this; of a data set with many parts, what its recipe takes for it."""
    recipe: str | None = None
    """How rows become documents; see :mod:`silo.hub`."""
    limit: int | None = None
    """At most so many documents, the first ones: a data set of the hub need not be read to its end."""
    sha256: str | None = None
    """Of the documents, as the result states it; another text is refused."""

    def read(self, base: Path) -> list[Document]:
        """Read them; paths are relative to ``base``.

        Raises:
            DataError: there are none, or they are not those that the suite was written for.
        """
        chosen = (each for each in self._open(base) if self._takes(each))
        documents = list(islice(chosen, self.limit))
        if not documents:
            raise DataError(f"{self.source} has no document for the suite's {self.described()}; check the filters")
        found = documents_hash(documents)
        if self.sha256 is not None and found != self.sha256:
            raise DataError(
                f"{self.source} gives documents with the hash {found[:12]}…, the suite was written for "
                f"{self.sha256[:12]}…; get the same text, or take sha256 out of the suite"
            )
        return documents

    def described(self) -> str:
        """The filters, for a message."""
        given = {"split": self.split, "owner": self.owner, "of": self.of}
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None) or "source"

    def _takes(self, document: Document) -> bool:
        return self.owner in (None, document.owner) and self.of in (None, document.source)

    def _open(self, base: Path) -> Iterator[Document]:
        kind, colon, _ = self.source.partition(":")
        remote = bool(colon) and kind in ("hf", "python", "pypi") and not self.source.startswith("hf:./")
        path = base / self.source
        if not remote and (path / "manifest.json").is_file():
            if self.split is None:
                raise UsageError(f"{path} is a corpus; say which split of it the suite means")
            yield from Corpus.open(path).documents(self.split)
            return
        recipe = Path(self.recipe) if self.recipe else None
        if self.source.startswith("hf:./"):
            # Ids hang on what the suite says, not on where its base lies: the same text is the test text everywhere.
            name = self.source.removeprefix("hf:")
            found = hub_documents(str(base / name), load_recipe(recipe, name), lambda _: None, called=name)
        else:
            spec = self.source if remote else str(path)
            found = open_source(spec, downloads=base / "downloads", recipe=recipe)
        for document in found:
            if self.split is None or split_of(document.id, "restricted") == self.split:
                yield document


@dataclass(frozen=True)
class Domain:
    """Text of one kind, and other text of that kind to fit weights on."""

    test: Data
    validation: Data | None = None
    """Where weights are fitted; not needed for models without a store, nor with a gate."""
    permissive: bool = False
    """Text that the weights might have learnt from; it is no part of the gap."""
    by_owner: bool = False
    """Make a domain of each owner."""
    tokens: int | None = None
    """Of its test text, in place of the suite's."""
    fit_tokens: int | None = None
    """Of its validation text, in place of the suite's."""


@dataclass(frozen=True)
class Entry:
    """A model, alone or with a store."""

    path: Path
    store: Path | None = None
    use: list = field(default_factory=lambda: ["lm"])
    weights: Path | None = None
    """A gate, fitted weights, or ``gate``, the store's own; if absent, fitted on each domain's validation text."""
    nearest: dict | None = None
    """How neighbours are looked up, such as ``{k: 1024, probes: 16}``; if absent, as when the weights were made."""

    def __post_init__(self) -> None:
        if (
            not self.use
            or self.use[0] != "lm"
            or not set(self.use) <= set(METHODS)
            or len(set(self.use)) < len(self.use)
        ):
            raise UsageError(f"use is {self.use}; expected lm, or lm and some of knn, ric and ngram")
        if (len(self.use) > 1) != (self.store is not None):
            raise UsageError(
                f"use is {self.use} and the store is {self.store}; methods beside lm need one, and it them"
            )
        try:
            _ = self.lookup
        except (TypeError, UsageError):
            raise UsageError(
                f"nearest is {self.nearest}; expected some of k, probes and metric, such as {{k: 1024}}"
            ) from None

    @property
    def lookup(self) -> Nearest | None:
        """What :attr:`nearest` says, if anything."""
        return None if self.nearest is None else Nearest.from_json(self.nearest)


@dataclass(frozen=True)
class Suite:
    """What a suite's file says."""

    name: str
    version: int
    models: dict[str, Entry]
    domains: dict[str, Domain]
    protocol: Protocol | None
    tokens: int | None
    fit_tokens: int | None
    reference: str | None
    digest: str
    """SHA-256 of what the file says, with what was set on the command line."""


@dataclass(frozen=True)
class _File:
    name: str
    version: int
    models: dict
    domains: dict
    protocol: dict | None = None
    tokens: int | None = None
    fit_tokens: int | None = None
    reference: str | None = None


def load_suite(path: Path, overrides: tuple[str, ...] = ()) -> Suite:
    """Read a suite, or one that comes with SILO by its name. Raises :class:`UsageError` if it is no suite."""
    own = SUITES / f"{path}.yaml"
    file = load_config(_File, own if own.is_file() and not path.is_file() else path, overrides)
    models = {
        str(name): build(Entry, _group(value, f"models: {name}"), where=f"{path}: models: {name}")
        for name, value in file.models.items()
    }
    domains = {
        str(name): _domain(_group(value, name), f"{path}: domains: {name}") for name, value in file.domains.items()
    }
    if not models or not domains:
        raise UsageError(f"{path} has {len(models)} models and {len(domains)} domains; expected some of both")
    if file.reference is not None and file.reference not in models:
        raise UsageError(f"{path}: the reference is {file.reference!r}; expected one of {', '.join(models)}")
    protocol = build(Protocol, file.protocol, where=f"{path}: protocol") if file.protocol else None
    said = {name: getattr(file, name) for name in _File.__dataclass_fields__}
    return Suite(
        file.name,
        file.version,
        models,
        domains,
        protocol,
        file.tokens,
        file.fit_tokens,
        file.reference,
        sha256(canonical_json(said)),
    )


def _domain(value: dict[str, Any], where: str) -> Domain:
    given = dict(value)
    for name in ("test", "validation"):
        if given.get(name) is not None:
            given[name] = build(Data, _group(given[name], name), where=f"{where}: {name}")
    unknown = sorted(set(given) - set(Domain.__dataclass_fields__))
    if unknown or "test" not in given:
        raise UsageError(
            f"{where} has {', '.join(given) or 'nothing'}; expected {', '.join(Domain.__dataclass_fields__)}"
        )
    return Domain(**given)


def _group(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}; expected a group of settings")
    return value


@dataclass(frozen=True)
class Texts:
    """The documents of one domain, read."""

    name: str
    permissive: bool
    test: list[Document]
    validation: list[Document]
    tokens: int | None
    fit_tokens: int | None


def read_domains(suite: Suite, base: Path) -> list[Texts]:
    """Read all domains, those ``by_owner`` once for each owner of their test text, in the order of their names."""
    found = []
    for name, domain in suite.domains.items():
        test = domain.test.read(base)
        validation = domain.validation.read(base) if domain.validation else []
        budgets = (domain.tokens or suite.tokens, domain.fit_tokens or suite.fit_tokens)
        if not domain.by_owner:
            found.append(Texts(name, domain.permissive, test, validation, *budgets))
            continue
        for owner in sorted({document.owner for document in test}):
            own = [[each for each in side if each.owner == owner] for side in (test, validation)]
            found.append(Texts(f"{name}: {owner}", domain.permissive, own[0], own[1], *budgets))
    return found


def documents_hash(documents: list[Document]) -> str:
    """SHA-256 over the texts of some documents, whatever their order."""
    return sha256(canonical_json(sorted(document.content_hash for document in documents)))
