"""What a text says of its own licence, held against what is declared for it: the stricter of the two wins.

Declarations are wrong in both directions, and one direction is dangerous: a restricted text with a permissive label.
So a document is read for notices, and so are the licence files beside it. A notice has to *state* something of the text
that it stands in: SPDX tags, licence fields, "this book is licensed under …", "all rights reserved" where nothing is
granted. A text about licences is under none of those that it names. Errors fall on the safe side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from silo.documents import Document
from silo.licensing import COPYLEFT, GRANT, NO_LICENSE, Policy, normalize_license, tier_of

HEAD_CHARACTERS, TAIL_CHARACTERS = 3000, 1500
"""Notices stand at the head of a file or at its foot; in between, a licence's name is more often the text's subject."""

ALL_RIGHTS_RESERVED = "LicenseRef-all-rights-reserved"
UNREADABLE = "LicenseRef-unreadable-notice"
"""A notice that restricts in words that no table knows."""

_PROSE = frozenset(
    (".md", ".rst", ".txt", ".adoc", ".asciidoc", ".html", ".htm", ".tex", ".texi", ".ipynb", ".mdx", ".qmd")
)
_CODE = frozenset((".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".js", ".ts", ".go", ".rs", ".java", ".rb", ".sh"))

_SPDX_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*(?P<name>[^\n]*?)[ \t]*(?:\*/|-->|[\"']{1,3}|$)", re.MULTILINE)

_VARIABLE = re.compile(r"^__licen[sc]e__(?:\s*:[^=\n]+)?\s*=\s*[\"'](?P<name>[^\"'\n]+)", re.MULTILINE)

_FIELD = re.compile(r"^[ \t>*:%#-]{0,6}(?:licen[sc]e|rights)\*{0,2}:\*{0,2}[ \t]+(?P<name>\S[^\n]{0,160})", re.I | re.M)
"""A field such as reStructuredText's ``:License:`` or a front matter's ``rights:``."""

_HEADER_NOTICE = re.compile(
    r"GNU\s+(?:\w+\s+){0,3}(?:General\s+Public|Free\s+Documentation)\s+Licen[sc]e"
    r"|(?:licen[sc]ed?|terms|released|distributed|available|covered)\b[^.;]{0,60}?\b(?:(?:[AL]?GPL|MPL)(?:\b|v?\d))"
    r"|(?:Mozilla|Eclipse|European\s+Union|Server\s+Side|Common)\s+Public\s+Licen[sc]e"
    r"|Common\s+Development\s+and\s+Distribution\s+Licen[sc]e|Business\s+Source\s+Licen[sc]e|\bCommons\s+Clause"
    r"|\bCC[- ]BY[- ](?:NC|SA|ND)\b[-\w. ]{0,12}|Attribution-?\s?(?:Share-?\s?Alike|Non-?Commercial|No-?Deriv)"
    r"|proprietary\s+and\s+confidential|confidential\s+and\s+proprietary"
    r"|unauthori[sz]ed\s+(?:copying|use|reproduction|distribution)"
    r"|for\s+(?:non-?\s?commercial|academic|research)\s+(?:\w+\s+){0,2}(?:use|purposes?)\s+only"
    r"|not\s+for\s+commercial\s+use",
    re.IGNORECASE,
)
"""What restricts a file of code when its header says it."""

_STATEMENT = re.compile(
    r"\b(?:this|these|our|the\s+(?:entire|whole|text\s+of\s+this)|all|except\s+where\s+otherwise\s+noted)\b"
    r"[^.\n]{0,40}?\b(?:work|books?|documents?|documentation|manual|text|texts|pages?|articles?|posts?|content|contents"
    r"|chapters?|(?:web)?site|tutorial|guide|course|lessons?|materials?|publication|dataset|wiki|translation|prose|files?)"
    r"\b[^.]{0,60}?\b(?:licen[sc]ed|released|distributed|published|provided|available|copied|reproduced|shared)\b"
    r"[^.]{0,60}?\b(?:under|according\s+to|subject\s+to|licen[sc]e)\b(?P<name>(?:[^.]|\.(?=\w)){0,240})"
    r"|^[ \t>*_(\[-]{0,6}licen[sc]ed\s+under\b(?P<bare>(?:[^.]|\.(?=\w)){0,240})",
    re.IGNORECASE | re.MULTILINE,
)
"""What a text of prose says of itself."""

_RESERVED = re.compile(
    r"^[^\w\n]{0,8}(?:copyright\b|\(c\)|©)[^\n]{0,160}(?:\n[^\n]{0,40})?all\s+rights\s+reserved", re.I | re.M
)
_GRANTS = re.compile(
    r"licen[sc]|permission\s+is\s|permission\s+to\s+|redistribution\s+and\s+use|public\s+domain|\bCC0\b|creative\s+commons",
    re.IGNORECASE,
)
"""Where any of this stands beside it, "all rights reserved" is the old formula of a text that grants them after all."""

_CC = re.compile(
    r"(?:\bCC[- ]BY|creative\s*commons\.org/licenses/by|creativecommons\.org/licenses/by"
    r"|(?:creative\s+commons[\s\"“'*_\[]+)?attribution)(?P<parts>[-\s/,]*(?:\(?(?:NC|SA|ND|non-?\s?commercial|share-?\s?alike"
    r"|no-?\s?deriv\w*)\)?[-\s/,]*)*)(?:international\s*)?(?:licen[sc]e\s*)?[(\s/]*v?\.?(?P<version>\d\.\d)?",
    re.IGNORECASE,
)

_GNU_TITLE = re.compile(r"GNU\s+(?P<kind>Affero\s+|Lesser\s+|Library\s+)?General\s+Public\s+Licen[sc]e", re.IGNORECASE)
_APACHE_TITLE = re.compile(r"Apache\s+License\W+Version\s+[12]|Licensed\s+under\s+the\s+Apache", re.IGNORECASE)
_SHORT_NAME = re.compile(
    r"\b(?P<name>[AL]?GPL(?:[- ]?v?\d(?:\.\d)?)?\+?|MPL(?:[- ]?v?\d(?:\.\d)?)?)(?!\w|[- ]+compatib)"
)


@dataclass(frozen=True, slots=True)
class Notice:
    """What a text says of its licence."""

    license: str
    """As an SPDX expression."""
    line: int
    """Where it stands, from 1."""
    text: str
    """The line itself."""


def contradiction(document: Document, policy: Policy) -> Notice | None:
    """The strictest notice in a document's text that is stricter than the licence that is declared for it."""
    declared = tier_of(document.license, policy)
    if not declared.permissive:
        return None
    read = notices(document.full_text, _suffix(document))
    found = [notice for notice in read if tier_of(notice.license, policy) > declared]
    return max(found, key=lambda notice: tier_of(notice.license, policy), default=None)


def with_notice(document: Document, notice: Notice) -> Document:
    """The document under its declared licence *and* that of a notice, which is what the two say together.

    The licence says so wherever the document goes from here, so that every gate that judges it anew comes to the same.
    """
    return replace(document, license=f"({document.license}) AND ({notice.license})")


def notices(text: str, suffix: str = "") -> Iterator[Notice]:
    """Every notice at the head and at the foot of a text.

    Args:
        text: a document's text.
        suffix: the ending of its file's name, which tells code from prose; a text without one is read as both.
    """
    foot = max(HEAD_CHARACTERS, len(text) - TAIL_CHARACTERS)
    for begin, end in ((0, HEAD_CHARACTERS), (foot, len(text))):
        zone = text[begin:end]
        if not zone:
            continue
        for position, license in _in_zone(zone, suffix, at_head=begin == 0):
            number = text.count("\n", 0, begin + position)
            yield Notice(license, number + 1, text[_line(text, begin + position)].strip())


def claim_of_file(document: Document) -> Notice | None:
    """What a licence file, or a file of metadata, says of the documents beside it; None for any other document.

    Only the head of a licence file counts: what follows is often the licences of what the package bundles.
    """
    name = PurePosixPath(_path(document)).name.lower()
    if re.fullmatch(r"(?:un)?licen[sc]e[\w.-]*|copying[\w.-]*|copyright[\w.-]*", name):
        return text_claim(document.text)
    if re.fullmatch(r"(?:metadata|about|package|codemeta)\.(?:ya?ml|json|toml)", name):
        for match in re.finditer(
            r"(?:^|[{,])\s*\"?(?:licen[sc]e|rights)\"?\s*[:=]\s*\"?([^\n\",}]+)", document.text, re.I | re.M
        ):
            license = read_name(match[1])
            if license is not None:
                return Notice(license, document.text.count("\n", 0, match.start(1)) + 1, match[0].strip())
    return None


def text_claim(text: str) -> Notice | None:
    """The restricted licence whose text a licence file is, or that its head names; None where it grants freely.

    What grants freely and has a condition beside it, as the Commons Clause is, grants under that condition.
    """
    head = text[:TAIL_CHARACTERS]
    granted, condition = GRANT.search(head) or _APACHE_TITLE.search(head), COPYLEFT.search(head)
    if granted and not condition:
        return None
    named = [(position, license) for position, license in _names(head) if not tier_of(license).permissive]
    if granted and condition and not named:
        named = [(condition.start(), UNREADABLE)]
    if not named:
        return None
    position, license = named[0]
    return Notice(license, text.count("\n", 0, position) + 1, text[_line(text, position)].strip())


def directory_of(document: Document) -> str:
    """The part of a document's id that the documents beside it share."""
    return document.id[: len(document.id) - len(PurePosixPath(_path(document)).name)]


def read_name(raw: str) -> str | None:
    """The licence that a field or the end of a sentence names, or None if it names none that is known."""
    name = normalize_license(re.sub(r"\(?https?://\S+|[*_`\[\]\"“”<>]", " ", raw).strip(" .,;"))
    if name != NO_LICENSE:
        return name
    return next((license for _, license in _names(raw)), None)


def _in_zone(zone: str, suffix: str, *, at_head: bool) -> Iterator[tuple[int, str]]:
    """Notices of one zone as (position, licence)."""
    code, prose = suffix not in _PROSE, suffix not in _CODE
    header = _header(zone) if code and at_head else ""
    for match in _SPDX_TAG.finditer(header if at_head and not prose else zone):
        name = normalize_license(match["name"])
        yield match.start(), UNREADABLE if name == NO_LICENSE else name
    if at_head and code:
        for match in _VARIABLE.finditer(zone):
            name = normalize_license(match["name"])
            if name != NO_LICENSE or COPYLEFT.search(match["name"]):
                yield match.start(), UNREADABLE if name == NO_LICENSE else name
        for match in _HEADER_NOTICE.finditer(_SPDX_TAG.sub(lambda tag: " " * len(tag[0]), header)):
            yield match.start(), _restricted_name(match[0] + header[match.end() : match.end() + 80])
    if at_head:
        for match in _FIELD.finditer(zone):
            license = read_name(match["name"])
            if license is not None:
                yield match.start("name"), license
    if prose:
        for match in _STATEMENT.finditer(zone):
            license = read_name(match["name"] or match["bare"] or "")
            if license is not None:
                yield match.start(), license
    reserved = _RESERVED.search(zone)
    if reserved is not None and not _GRANTS.search(zone):
        yield reserved.start(), ALL_RIGHTS_RESERVED


def _names(text: str) -> Iterator[tuple[int, str]]:
    """The licences that a text names, as (position, SPDX), the first first."""
    found: list[tuple[int, str]] = []
    for match in _CC.finditer(text):
        license = _creative_commons(match)
        if license is not None:
            found.append((match.start(), license))
    for match in _GNU_TITLE.finditer(text):
        version = re.match(r"[\s,(]*(?:version|v\.?)?\s*(\d(?:\.\d)?)", text[match.end() :], re.IGNORECASE)
        name = normalize_license(
            f"GNU {(match['kind'] or '').strip()} General Public License {version[1] if version else ''}"
        )
        found.append((match.start(), UNREADABLE if name == NO_LICENSE else name))
    for match in re.finditer(r"GNU\s+Free\s+Documentation\s+Licen[sc]e|\bGFDL\b", text, re.IGNORECASE):
        found.append((match.start(), "GFDL-1.3-or-later"))
    for match in _SHORT_NAME.finditer(text):
        name = normalize_license(match["name"])
        found.append((match.start(), UNREADABLE if name == NO_LICENSE else name))
    for match in _HEADER_NOTICE.finditer(text):
        if not any(abs(match.start() - position) < 60 for position, _ in found):
            found.append((match.start(), UNREADABLE))
    yield from sorted(found)


def _creative_commons(match: re.Match[str]) -> str | None:
    """A Creative Commons licence as SPDX; None for the bare word "attribution"."""
    parts = re.sub(r"[^a-z]", "", match["parts"].lower())
    flags = [flag for flag, words in (("NC", r"nc|noncommercial"), ("ND", r"nd|noderiv"), ("SA", r"sa|sharealike"))
             if re.search(words, parts)]  # fmt: skip
    stated = match[0].lower().startswith(("cc", "creative"))
    if not flags and not (stated and match["version"]):
        return None
    name = "-".join(["CC-BY", *flags, match["version"] or "4.0"])
    known = normalize_license(name)
    return "LicenseRef-" + name if known == NO_LICENSE else known


def _restricted_name(text: str) -> str:
    """The SPDX id of a notice that is known to restrict."""
    for _, license in _names(text):
        if not tier_of(license).permissive:
            return license
    return UNREADABLE


def _path(document: Document) -> str:
    return document.id.partition("#")[0].rpartition(":")[2]


def _suffix(document: Document) -> str:
    return PurePosixPath(_path(document)).suffix.lower()


def _line(text: str, position: int) -> slice:
    end = text.find("\n", position)
    return slice(text.rfind("\n", 0, position) + 1, end if end >= 0 else len(text))


def _header(text: str) -> str:
    """The text with every line of code, and every comment sign, made blank; positions stay as they are.

    Blanks keep a phrase from being pieced together across code.
    """
    header = []
    quote, told = "", False  # the open triple quote, and whether it opened a docstring or a string in code
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        blank = re.sub(r"[^\n]", " ", line)
        if quote:
            header.append(line if told else blank)
            quote = "" if quote in stripped else quote
            continue
        opening = re.match(r"[rRuU]?(\"\"\"|''')", stripped)
        comment = stripped.startswith(("#", "//", "/*", "*", "--", ";", "%", "<!--", ".. "))
        if comment:
            signs = len(line) - len(line.lstrip(" \t#/*-;%<!."))
            header.append(" " * signs + line[signs:])
        else:
            header.append(line if opening else blank)
            odd = [sign for sign in ('"""', "'''") if stripped.count(sign) % 2]
            quote, told = (odd[0], opening is not None) if odd else ("", False)
    return "".join(header)
