"""Evidence: what a text says of its own licence, and what it only mentions."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.documents import Document
from silo.evidence import ALL_RIGHTS_RESERVED, UNREADABLE, claim_of_file, contradiction, notices, with_notice
from silo.licensing import DEFAULT_POLICY, Policy, Tier, tier_of


def found(text: str, license: str = "MIT", id: str = "src/file", policy: Policy = DEFAULT_POLICY):
    return contradiction(Document(id=id, text=text, license=license), policy)


NOTICES = {
    "# SPDX-License-Identifier: GPL-2.0-or-later\nx = 1\n": (1, "GPL-2.0-or-later"),
    "# SPDX-License-Identifier: Nobody-Knows-1.0\n": (1, UNREADABLE),
    "/* SPDX-License-Identifier: MPL-2.0 */\n": (1, "MPL-2.0"),
    "#!/usr/bin/python\n# Licensed under the LGPL: see COPYING\n": (2, "LGPL-2.0-or-later"),
    "# it under the terms of the GNU Lesser\n# General Public License\n": (1, "LGPL-2.0-or-later"),
    '"""A module.\n\nThis file is under the Mozilla Public\nLicense.\n"""\n': (3, UNREADABLE),
    "# From an answer under CC BY-SA 4.0\n": (1, "CC-BY-SA-4.0"),
    "# Unauthorized copying of this file is prohibited\n": (1, UNREADABLE),
    "import os\n__license__ = 'GPLv3'\n": (2, "GPL-3.0-only"),
    "__license__ = 'GPL, more or less'\n": (1, UNREADABLE),
    "__license__: str = 'GPLv3'\n": (1, "GPL-3.0-only"),
    "# For non-commercial research purposes only\n": (1, UNREADABLE),
    "# Not for commercial use.\n": (1, UNREADABLE),
    ":Author: Ada\n:License: CC By-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/)\n": (2, "CC-BY-SA-3.0"),
    "# Title\n\nThis book is licensed under the Creative Commons\nAttribution-NonCommercial-ShareAlike 4.0\n": (
        3,
        "CC-BY-NC-SA-4.0",
    ),
    "Text.\n\n" * 900 + "All content on this site is available under CC BY-NC-ND 4.0.\n": (1801, "CC-BY-NC-ND-4.0"),
    "Licensed under the GNU Free Documentation License, Version 1.3\n": (1, "GFDL-1.3-or-later"),
    "Copyright (c) 2004 The Daily Planet. All rights reserved.\n\nA story.": (1, ALL_RIGHTS_RESERVED),
    "A story.\n\n© 2004 The Daily Planet\nAll rights reserved": (3, ALL_RIGHTS_RESERVED),
}


@pytest.mark.parametrize("text", NOTICES)
def test_a_stricter_notice_is_found(text):
    """A notice in a comment, a docstring, a field, a sentence on the text itself, at head or foot: line and licence."""
    notice = found(text)
    line, license = NOTICES[text]
    assert (notice.line, notice.license) == (line, license)
    assert notice.text == text.splitlines()[line - 1].strip()
    assert not tier_of(notice.license).permissive


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "x = 1\n",
        "# SPDX-License-Identifier: MIT OR GPL-2.0-only\n",
        '"""SPDX-License-Identifier: Apache-2.0"""\n',
        "# Copyright Ada. All rights reserved.\n# Redistribution and use in source and binary forms are permitted\n",
        "CLASSIFIERS = ['License :: OSI Approved :: GNU General Public License v3 (GPLv3)']\n",
        'NOTICE = """\nThis is under the GNU General Public License\n"""\nx = 1\n',
        "__license__ = 'MIT'\n",
        "__license__ = 'see LICENSE'\n",
        "import matplotlib as mpl  # not the licence\n",
        "# permissive\n" + "x = 1\n" * 1000 + "# GNU General Public License\n" + "x = 1\n" * 1000,
        "Bash is distributed under the GNU General Public License, as is Emacs.\n",
        "The picture is by Radomil, CC BY-SA 3.0.\n",
        "This work is licensed under a Creative Commons Attribution 4.0 International License.\n",
        "Proprietary products and non-commercial use are discussed in chapter 3.\n",
    ],
)
def test_a_mere_mention_is_no_notice(text):
    """A licence that a text lists, quotes, discusses, or names far down does not restrict it."""
    notice = found(text, license="CC-BY-4.0")
    assert notice is None


def test_prose_and_code_are_read_by_their_own_rules():
    """A Markdown heading is no comment: the ending of a file's name decides, and without one both rules apply."""
    text = "# GNU General Public License\n\nHow to choose a licence.\n"
    assert found(text, id="docs/licences.md") is None
    assert found(text, id="tool.py").license == "GPL-1.0-or-later"
    assert found(text, id="no-suffix").license == "GPL-1.0-or-later"


def test_a_notice_counts_only_if_it_is_stricter():
    """A BY notice moves a public-domain text to BY, and says nothing new of a CC-BY text or a restricted one."""
    text = "license: CC-BY-4.0\n"
    assert found(text, license="CC0-1.0").license == "CC-BY-4.0"
    assert found(text, license="CC-BY-4.0") is None
    assert found("# Licensed under the GPLv3\n", license="GPL-2.0-only") is None


def test_the_policy_judges_notices_too():
    """Where a policy takes CC-BY-SA for BY, a CC-BY-SA notice is no contradiction of a BY declaration."""
    text = ":License: CC-BY-SA-4.0\n"
    policy = Policy(licenses=(("CC-BY-SA-*", Tier.BY),))
    assert found(text, license="CC-BY-4.0", policy=policy) is None
    assert found(text, license="CC-BY-4.0") is not None


def test_a_pair_is_read_with_its_prompt():
    """A notice in a prompt, which weights and tokenizer read too, counts as one in the text."""
    pair = Document(id="a", prompt="# SPDX-License-Identifier: GPL-3.0-only\n", text="x = 1\n", license="MIT")
    assert contradiction(pair, DEFAULT_POLICY).license == "GPL-3.0-only"


def test_a_contradiction_is_written_into_the_licence():
    """The document goes on under both licences, of which the stricter counts wherever it is judged again."""
    document = Document(id="a", text=":License: GPL-3.0-only\n", license="MIT OR Apache-2.0")
    believed = with_notice(document, contradiction(document, DEFAULT_POLICY))
    assert believed.license == "(MIT OR Apache-2.0) AND (GPL-3.0-only)"
    assert tier_of(believed.license) is Tier.RESTRICTED


@pytest.mark.parametrize(
    ("id", "text", "license"),
    [
        ("repo/LICENSE", "       GNU GENERAL PUBLIC LICENSE\n        Version 3, 29 June 2007\n", "GPL-3.0-only"),
        ("repo/COPYING.LESSER", "GNU LESSER GENERAL PUBLIC LICENSE\nVersion 2.1", "LGPL-2.1-only"),
        ("repo/LICENSE.md", "Attribution-NonCommercial-NoDerivatives 4.0 International", "CC-BY-NC-ND-4.0"),
        ("repo:book/LICENSE.txt", "Creative Commons Attribution-ShareAlike 4.0 International", "CC-BY-SA-4.0"),
        ("repo/metadata.yaml", "title: A book\nrights: CC BY-NC\n", "CC-BY-NC-4.0"),
        ("repo/LICENSE", 'A "Commons Clause" Condition\n\nPermission is hereby granted, free of charge', UNREADABLE),
        ("repo/LICENSE", "Commons Clause\n\nApache License\nVersion 2.0, January 2004\n", UNREADABLE),
        ("repo/LICENSE", "Permission is hereby granted, free of charge, for non-commercial research only", UNREADABLE),
        ("repo/package.json", '{"name": "x", "license": "GPL-2.0-only"}', "GPL-2.0-only"),
    ],
)  # fmt: skip
def test_a_licence_file_speaks_for_what_is_beside_it(id, text, license):
    """A licence file, or a field of metadata, gives the restricted licence that it is or names."""
    assert claim_of_file(Document(id=id, text=text)).license == license


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("repo/LICENSE", "MIT License\n\nPermission is hereby granted, free of charge, to any person"),
        ("repo/LICENSE", "Apache License\nVersion 2.0, January 2004\n"),
        (
            "repo/LICENSE",
            "Copyright\nRedistribution and use in source and binary forms\n" + "x\n" * 2000 + "GNU GPL v3",
        ),
        ("repo/LICENSING.md", "GNU GENERAL PUBLIC LICENSE"),
        ("repo/main.py", "GNU GENERAL PUBLIC LICENSE"),
    ],
)
def test_a_free_licence_file_restricts_nothing(id, text):
    """A permissive licence file makes no claim, whatever bundled licences follow its head; nor does another file."""
    claim = claim_of_file(Document(id=id, text=text))
    assert claim is None or id == "repo/LICENSING.md"


@given(
    st.text(alphabet="\"'#\n xGPL*/:()Licensed under CCBYNCSA-.1234 \u00e9", max_size=300),
    st.sampled_from(["", ".py", ".md"]),
)
def test_a_notice_is_a_line_of_the_text(text, suffix):
    """Whatever quotes and comments a text opens and leaves open, a notice is one of its own lines, at its number."""
    for notice in notices(text, suffix):
        assert notice.text in text
        assert notice.text == text.split("\n")[notice.line - 1].strip()


@pytest.mark.parametrize(
    "unit", ["licensed ", "CC BY-NC ", "attribution NC ", "this work is licensed ", "# GNU GNU ", "((", "- NC-"]
)
def test_no_text_takes_long(unit):
    """No repetition of words makes the patterns run away: a bound far above what is needed, not a measurement."""
    begin = time.process_time()
    list(notices(unit * 3000))
    assert time.process_time() - begin < 5
