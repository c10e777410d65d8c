"""Which tier a licence belongs to: the gate between the weights and everything else.

One rule decides every doubtful case here: a licence is restricted until something that we trust says otherwise. What
is trusted is small: a parsed SPDX expression, ScanCode's category of each licence in it, and the policy file of the
person who runs SILO. Tiers are those of SILO's Open License Corpus (arXiv 2308.04430).

A leaf module: it imports nothing of ours but the errors.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase as _matches
from pathlib import Path
from typing import Any, Protocol

import license_expression

from silo.errors import UsageError

NO_LICENSE = "NOASSERTION"
"""SPDX's word for a licence that nobody stated, or that nobody can read."""

_IDENTIFIER = re.compile(r"[A-Za-z0-9.:-]+\+?")
"""One licence as SPDX spells it. A plus elsewhere than at the end stands between two, in the words of real metadata."""

RULES = 4
"""Version of the reading below. It is part of every policy's fingerprint, so that a changed reading shows."""


@functools.total_ordering
class Tier(enum.Enum):
    """What may be done with a text, from freest to strictest: ``max`` of two tiers is the stricter one."""

    PD = "PD"
    """Public domain: no condition at all."""
    SW = "SW"
    """Permissive software licences: keep the notice."""
    BY = "BY"
    """Attribution licences of texts and data: name the author wherever the text shows."""
    RESTRICTED = "restricted"
    """All else, known or unknown. It may be read from a store, and never trains a weight."""
    REFUSED = "refused"
    """What a policy keeps out of everything: neither weights nor store."""

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Tier):
            return NotImplemented
        order = list(Tier)
        return order.index(self) < order.index(other)

    @property
    def permissive(self) -> bool:
        """Whether the weights may learn from it."""
        return self < Tier.RESTRICTED


class Licensed(Protocol):
    """What a policy looks at: a document, or a row of a corpus's index."""

    @property
    def license(self) -> str:
        """An SPDX expression, or whatever stood in its place."""

    @property
    def owner(self) -> str:
        """The rights holder."""

    @property
    def source(self) -> str:
        """Where the text came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator knows better than the tables: tiers by licence, by owner, by source.

    A source or an owner is more specific than a licence and wins over it; where several rules of one kind match, the
    strictest counts. Licences and sources may be patterns such as ``CC-BY-SA-*``. A rule that restricts an owner holds
    for the name in any case and in any of Unicode's forms, one that frees for that spelling alone.
    """

    licenses: tuple[tuple[str, Tier], ...] = ()
    owners: tuple[tuple[str, Tier], ...] = ()
    sources: tuple[tuple[str, Tier], ...] = ()
    evidence: tuple[tuple[str, str, str], ...] = ()
    """What is said elsewhere of a source, as (pattern, licence, where it is said). It is no rule: a licence that is
    stricter than the declared one counts, as if a file beside the documents said so."""

    def tier(self, document: Licensed) -> Tier:
        """The tier of a document. Unknown, missing and unparsable licences are restricted."""
        ruled = [tier for pattern, tier in self.sources if _matches(document.source, pattern)]
        ruled += [
            tier
            for owner, tier in self.owners
            if owner == document.owner or (not tier.permissive and _alike(owner, document.owner))
        ]
        return max(ruled) if ruled else tier_of(document.license, self)

    def license_rule(self, name: str) -> Tier | None:
        """What the policy says of a licence, if it says anything. Case does not matter, as in SPDX.

        A pattern frees one identifier. Were a whole expression to match it, ``MIT*`` would free "MIT AND GPL-3.0-only",
        or "MIT/GPL-3.0-only". One that restricts may match what is no identifier, as long as it is one word.
        """
        name = name.lower()
        rules = [(pattern.lower(), tier) for pattern, tier in self.licenses]
        one_word, one_licence = " " not in name, _IDENTIFIER.fullmatch(name) is not None
        matches = [
            tier
            for pattern, tier in rules
            if pattern == name or ((one_licence if tier.permissive else one_word) and _matches(name, pattern))
        ]
        return max(matches, default=None)

    def read_license(self, raw: str) -> str:
        """A licence as it is declared: SPDX, or what the policy has a rule for, stays; another name is read as SPDX."""
        if self.license_rule(raw) is not None or is_spdx(raw):
            return raw
        known = normalize_license(raw)
        return raw if known == NO_LICENSE else known

    def to_json(self) -> dict[str, Any]:
        """The mapping that :meth:`from_json` reads back, and that a policy file holds."""
        kinds = {"licenses": self.licenses, "owners": self.owners, "sources": self.sources}
        rules: dict[str, Any] = {kind: {name: tier.value for name, tier in rules} for kind, rules in kinds.items()}
        evidence: dict[str, list[dict[str, str]]] = {}
        for source, license, where in self.evidence:
            evidence.setdefault(source, []).append({"license": license, "where": where})
        return {**rules, "evidence": evidence}

    @classmethod
    def from_json(cls, record: object, *, where: str) -> Policy:
        """Make a policy of a mapping. ``where`` names the file in errors (:class:`UsageError`)."""
        if not isinstance(record, Mapping):
            raise UsageError(f"{where}: a {type(record).__name__}, expected a mapping of licenses, owners, sources")
        for kind in record:
            if kind not in ("licenses", "owners", "sources", "evidence"):
                raise UsageError(f"{where}: unknown key {kind!r}; expected licenses, owners, sources or evidence")
        rules = {kind: _rules(record[kind], where=f"{where}: {kind}") for kind in record if kind != "evidence"}
        return cls(**rules, evidence=_evidence(record.get("evidence", {}), where=f"{where}: evidence"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the policy and of the rules it amends. Two stores with one fingerprint judge alike."""
        value = {"policy": self.to_json(), "rules": RULES}
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


DEFAULT_POLICY = Policy()
"""The tables alone."""


OPEN_LICENSE_CORPUS = "olc"
"""Names the policy that comes with SILO: the reading of its paper, which takes CC-BY-SA for an attribution licence."""


def load_policy(path: Path) -> Policy:
    """Read a policy from YAML, or the one that is named ``olc``.

    Raises:
        UsageError: it is missing, not YAML, or says what no policy can.
    """
    import yaml

    if str(path) == OPEN_LICENSE_CORPUS and not path.is_file():
        path = Path(__file__).with_name("open_license_corpus.yaml")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected a policy file (YAML)") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a YAML policy: {error}") from None
    return Policy.from_json({} if record is None else record, where=str(path))


def _alike(one: str, other: str) -> bool:
    """Whether two names are one but for case, blanks around them, and the way in which Unicode spells them."""
    first, second = (unicodedata.normalize("NFKC", name).casefold().strip() for name in (one, other))
    return first == second


def _rules(rules: object, *, where: str) -> tuple[tuple[str, Tier], ...]:
    if not isinstance(rules, Mapping):
        raise UsageError(f"{where}: a {type(rules).__name__}, expected a mapping from names to tiers")
    tiers = {tier.value: tier for tier in Tier}
    for name, tier in rules.items():
        if not isinstance(tier, str) or tier not in tiers:
            raise UsageError(f"{where}: {name!r} has tier {tier!r}, expected one of {', '.join(tiers)}")
    return tuple(sorted((str(name), tiers[tier]) for name, tier in rules.items()))


def _evidence(record: object, *, where: str) -> tuple[tuple[str, str, str], ...]:
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: a {type(record).__name__}, expected a mapping from sources to what is said of them")
    found = []
    for source, claims in record.items():
        for claim in claims if isinstance(claims, list) else [claims]:
            if not isinstance(claim, Mapping) or set(claim) != {"license", "where"}:
                raise UsageError(f"{where}: {source!r} has {claim!r}, expected a licence and where it is said")
            found.append((str(source), str(claim["license"]), str(claim["where"])))
    return tuple(sorted(found))


# --- SPDX expressions -------------------------------------------------------------------------------------------------

_LONGEST_EXPRESSION = 4096
"""Longer strings are licence texts, not names of licences, and are not parsed."""

_PUBLIC_DOMAIN = re.compile(r"LicenseRef-PublicDomain(-(?!(?:NC|ND|SA)\b)[A-Z]{2}(-?Gov)?)?", re.IGNORECASE)
"""SPDX has no id for "nobody owns it". Corpora spell it ``LicenseRef-PublicDomain``, some with the jurisdiction
behind it (``-US``, ``-USGov``), and nothing else; ScanCode knows only the bare form."""

_ATTRIBUTION = re.compile(
    r"CC-BY-\d.*|ODC-By-.*|CDLA-Permissive-.*|O-UDA-.*|OGL-(UK|Canada)-.*|OPL-UK-.*|OGDL-Taiwan-.*|NLOD-.*"
    r"|etalab-.*|DL-DE-BY-.*",
    re.IGNORECASE,
)
"""Licences that ScanCode calls permissive and that ask for the author's name wherever the *text* is used: Creative
Commons' CC-BY (``CC-BY-SA``, ``-NC``, ``-ND`` have other categories, and no digit after ``CC-BY-``) and the open data
and open government licences modelled on it."""

_NOT_PERMISSIVE = frozenset(
    {
        "CERN-OHL-1.1",  # reciprocal: modified designs are passed on under the same licence
        "CERN-OHL-1.2",
        "IEC-Code-Components-EULA",  # for use with the IEC's standards only
        "JSON",  # "for Good, not Evil": a field of use, neither free (FSF) nor open (OSI)
        "MPEG-SSG",  # for products that conform to the standard only
        "MS-LPL",  # MS-PL, for Windows only
        "MS-PL",  # source is passed on under the same licence (FSF: weak copyleft)
        "OFL-1.0",  # derivatives are passed on under the same licence, and nothing is sold by itself
        "OFL-1.0-RFN",
        "OFL-1.0-no-RFN",
        "OFL-1.1-RFN",
        "OFL-1.1-no-RFN",
        "OPUBL-1.0",  # its options forbid modified versions
        "Sendmail",  # binaries only with an offer of the source
        "Sendmail-Open-Source-1.1",
    }
)
"""SPDX licences that ScanCode files under "Permissive", and whose text says otherwise."""


def tier_of(license: str, policy: Policy = DEFAULT_POLICY) -> Tier:
    """The tier of a licence expression: ``A OR B`` takes the better side, ``A AND B`` the worse. It never raises.

    ``A WITH exception`` is as strict as ``A``. An exception only ever adds permissions, so a restricted licence stays
    restricted; on a permissive licence it must be one that ScanCode calls permissive too, since "Apache-2.0 WITH
    Commons-Clause" exists, and takes back what the licence gave.
    """
    if not isinstance(license, str) or not license.strip():
        return Tier.RESTRICTED
    whole = policy.license_rule(license.strip())
    if whole is not None:
        return whole
    expression = parse_expression(license.strip())
    return Tier.RESTRICTED if expression is None else _tier_of_expression(expression, policy)


def is_spdx(license: str) -> bool:
    """Whether a string is an SPDX expression of licences that are known."""
    expression = parse_expression(license.strip()) if license.strip() else None
    return expression is not None and not _licensing().unknown_license_keys(expression)


@functools.lru_cache(maxsize=4096)
def parse_expression(license: str) -> Any:
    """The parsed expression, or None. Unknown licences inside it are kept, and restricted later."""
    if len(license) > _LONGEST_EXPRESSION:
        return None
    try:
        return _licensing().parse(license)
    except Exception:
        # Whatever a parser stumbles over is not a licence that we know. It raises several unrelated classes, of which
        # ExpressionError derives from Exception alone.
        return None


def _tier_of_expression(expression: Any, policy: Policy) -> Tier:
    ruled = policy.license_rule(expression.render())
    if ruled is not None:
        return ruled
    if isinstance(expression, _licensing().OR):
        return min(_tier_of_expression(part, policy) for part in expression.args)
    if isinstance(expression, _licensing().AND):
        return max(_tier_of_expression(part, policy) for part in expression.args)
    if isinstance(expression, license_expression.LicenseWithExceptionSymbol):
        base = _tier_of_expression(expression.license_symbol, policy)
        benign = expression.exception_symbol.key in _permissive_exceptions()
        return base if benign else Tier.RESTRICTED
    if _PUBLIC_DOMAIN.fullmatch(expression.key):
        return Tier.PD
    return _tiers().get(expression.key, Tier.RESTRICTED)


@functools.cache
def _licensing() -> Any:
    return license_expression.get_spdx_licensing()


@functools.cache
def _tiers() -> dict[str, Tier]:
    """SPDX id → tier, for every licence that ScanCode knows (an exception is no licence)."""
    index = license_expression.get_license_index()
    known = ((entry["spdx_license_key"], entry) for entry in index)
    return {key: _tier_of_category(key, entry["category"]) for key, entry in known if key and not entry["is_exception"]}


@functools.cache
def _permissive_exceptions() -> frozenset[str]:
    index = license_expression.get_license_index()
    return frozenset(
        entry["spdx_license_key"]
        for entry in index
        if entry["is_exception"] and entry["category"] == "Permissive" and entry["spdx_license_key"]
    )


def _tier_of_category(key: str, category: str) -> Tier:
    """From ScanCode's category to a tier.

    "Permissive" alone is not enough. Of the 967 licences in that drawer 518 have no SPDX id of their own
    (``LicenseRef-scancode-…``): firmware blobs, standards that may not be modified, the Free Art License, which is
    copyleft. A licence is permissive here if SPDX, a second reader, has listed it too; a policy can add others. The
    public-domain drawer was read whole, and holds dedications only.
    """
    if category == "Public Domain":
        return Tier.PD
    if category != "Permissive" or key.startswith("LicenseRef-") or key in _NOT_PERMISSIVE:
        return Tier.RESTRICTED
    return Tier.BY if _ATTRIBUTION.fullmatch(key) else Tier.SW


# --- the strings of real metadata -------------------------------------------------------------------------------------

_NAMES = {
    "mit": "MIT",
    "mit mit": "MIT",
    "expat": "MIT",
    "mit no attribution": "MIT-0",
    # Every Apache licence (1.0, 1.1, 2.0) is permissive, so that the tier does not hang on the version. 2.0 (2004) is
    # older than the package index, and its notice duties are the widest of the three.
    "apache": "Apache-2.0",
    "apache software": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache2": "Apache-2.0",
    "apache software 2": "Apache-2.0",
    "apache software 2.0": "Apache-2.0",
    # "BSD" names a family, not a licence: 0, 1, 2, 3 and 4 clauses, each of them permissive. Three clauses is what the
    # word means to OSI and to most packages, and holds all conditions of the shorter ones. The 4th clause (advertising)
    # went out of use in 1999, and asks for a notice, as the others do: the tier would be the same.
    "bsd": "BSD-3-Clause",
    "bsd style": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "revised bsd": "BSD-3-Clause",
    "bsd 3 clause": "BSD-3-Clause",
    "bsd 3 clause new or revised": "BSD-3-Clause",
    "3 clause bsd": "BSD-3-Clause",
    "simplified bsd": "BSD-2-Clause",
    "bsd 2 clause": "BSD-2-Clause",
    "2 clause bsd": "BSD-2-Clause",
    "freebsd": "BSD-2-Clause",
    "isc": "ISC",
    "boost software 1.0": "BSL-1.0",
    "zlib libpng": "Zlib",
    "zope public": "ZPL-2.1",
    "zpl 2.1": "ZPL-2.1",
    "psf": "PSF-2.0",
    "python software foundation": "PSF-2.0",
    "historical permission notice and disclaimer": "HPND",
    "university of illinois ncsa open source": "NCSA",
    "universal permissive": "UPL-1.0",
    "unlicense": "Unlicense",
    "public domain": "LicenseRef-scancode-public-domain",
    "cc0": "CC0-1.0",
    "cc0 1.0": "CC0-1.0",
    "cc0 1.0 universal": "CC0-1.0",
    "cc0 1.0 universal public domain dedication": "CC0-1.0",
    "cc by 3.0": "CC-BY-3.0",
    "cc by 4.0": "CC-BY-4.0",
    "creative commons attribution 4.0": "CC-BY-4.0",
    "creative commons attribution 4.0 international": "CC-BY-4.0",
    "cc by sa 4.0": "CC-BY-SA-4.0",
    "cc by nc 4.0": "CC-BY-NC-4.0",
    "mpl": "MPL-2.0",
    "mpl 2.0": "MPL-2.0",
    "mozilla public": "MPL-2.0",
    "mozilla public 1.1": "MPL-1.1",
    "mozilla public 2.0": "MPL-2.0",
    "eclipse public 2.0": "EPL-2.0",
    "european union public licence 1.2": "EUPL-1.2",
    "gnu library or lesser general public": "LGPL-2.0-or-later",
}
"""Free-form names, spelled as :func:`_words` spells them. A name stands here only if it means one licence, or a family
whose members share a tier."""

_GNU = re.compile(
    r"(?:gnu )?(?:(?P<short>[al]?gpl)|(?P<kind>affero |lesser |library )?general public)"
    r"(?: ?(?P<number>[123])(?:\.(?P<minor>[01]))?)?(?P<later> ?\+| or (?:later|newer|greater|any later))?"
)

GRANT = re.compile(
    r"Permission\s+is\s+hereby\s+granted,\s+free\s+of\s+charge|Redistribution\s+and\s+use\s+in\s+source\s+and\s+binary"
)
"""How the texts of MIT's and BSD's licences begin."""

COPYLEFT = re.compile(
    r"\b[AL]?GPL(?:\b|v?\d)|\bGNU\s+(?:\w+\s+){0,3}(?:General\s+Public|Free\s+Documentation)|(?-i:\bMPL\b)"
    r"|Mozilla\s+Public\s+Licen|Eclipse\s+Public\s+Licen|Common\s+Development\s+and\s+Distribution\s+Licen"
    r"|European\s+Union\s+Public\s+Licen|Server\s+Side\s+Public\s+Licen|Share-?\s?Alike|non-?\s?commercial"
    r"|Commons\s+Clause|proprietary",
    re.IGNORECASE,
)
"""Words that no permissive licence's text needs."""


_UNREAD = re.compile(r"[^\s\x21-\x7e“”‘’–—©®™]|[!?~]")
"""What a name may not hold if it is to be read without it: letters of another script may say "not"."""


def normalize_license(raw: str) -> str:
    """Read a free-form licence string as an SPDX expression, or return ``NOASSERTION``.

    It takes SPDX itself, the usual names, trove classifiers, and a whole text whose first line names it, if it grants
    what MIT and BSD grant and nothing in it speaks of copyleft. What is not in the tables is not guessed.
    """
    text = raw.strip()
    if is_spdx(text):
        return parse_expression(text).render()
    if "\n" in text:
        plain = GRANT.search(text) and not COPYLEFT.search(text)
        return normalize_license(text.partition("\n")[0]) if plain else NO_LICENSE
    if _UNREAD.search(text):
        return NO_LICENSE
    classifier = text.startswith("License ::")
    if classifier:
        text = re.sub(r"\([^)]*\)", " ", text.rpartition(" :: ")[2])
    words = _words(text)
    named = _NAMES.get(words) or _gnu(words)
    return named or (NO_LICENSE if classifier else _several(text))


def _words(text: str) -> str:
    """A name without what does not tell licences apart: case, punctuation, "the … License, Version …"."""
    plain = re.sub(r"(?<=gpl)-?v(?=\d)|\bv\.?\s*(?=\d)", " ", text.lower())
    words = re.sub(r"[^a-z0-9.+]+", " ", plain).split()
    return " ".join(word.strip(".") for word in words if word not in ("the", "license", "licence", "version"))


def _gnu(words: str) -> str | None:
    match = _GNU.fullmatch(words)
    if match is None:
        return None
    kinds = {"affero ": "AGPL", "lesser ": "LGPL", "library ": "LGPL", None: "GPL"}
    name = match["short"].upper() if match["short"] else kinds[match["kind"]]
    oldest = {"GPL": "1", "LGPL": "2", "AGPL": "3"}[name]
    number = f"{match['number'] or oldest}.{match['minor'] or '0'}"
    suffix = "or-later" if match["later"] or not match["number"] else "only"
    known = f"{name}-{number}-{suffix}"
    return known if known in _tiers() else None


def _several(text: str) -> str:
    """A list of names: a sum of licences, unless nothing but "or" stands between them."""
    for separator, operator in ((r"\s*[,;/&|+]\s*|\s+and\s+", "AND"), (r"\s+or\s+", "OR")):
        parts = re.split(separator, text, flags=re.IGNORECASE)
        if len(parts) > 1:
            names = [normalize_license(part) for part in parts]
            known = all(name != NO_LICENSE for name in names)
            return f" {operator} ".join(f"({name})" if " " in name else name for name in names) if known else NO_LICENSE
    return NO_LICENSE
