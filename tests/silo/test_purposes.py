"""What a licence permits by itself, and which patterns hold for an expression."""

import pytest

from silo.purposes import asks_for_attribution, matches, permits, touches


@pytest.mark.parametrize(
    ("license", "commercial", "research", "attribution"),
    [
        ("MIT", True, True, True),
        ("0BSD", True, True, False),
        ("CC0-1.0", True, True, False),
        ("LicenseRef-PublicDomain-US", True, True, False),
        ("CC-BY-4.0", True, True, True),
        ("CC-BY-SA-3.0-US", True, True, True),
        ("GPL-3.0-or-later", True, True, True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", True, True, True),
        ("CC-BY-NC-4.0", False, True, True),
        ("CC-BY-NC-ND-3.0-US", False, True, True),
        ("CC-BY-ND-4.0", False, True, True),
        ("Apache-2.0 WITH LicenseRef-scancode-commons-clause", False, False, True),
        ("LicenseRef-BBC-all-rights-reserved", False, False, True),
        ("NOASSERTION", False, False, True),
        ("", False, False, True),
        ("all rights reserved (c)", False, False, True),
        ("MIT OR NOASSERTION", True, True, True),
        ("CC0-1.0 OR MIT", True, True, False),
        ("MIT AND CC-BY-NC-4.0", False, True, True),
        ("MIT AND NOASSERTION", False, False, True),
    ],
)
def test_purposes_by_licence(license, commercial, research, attribution):
    """Non-commercial and no-derivatives licences serve research only, unknown ones nothing; the author is named unless
    the licence asks for nothing."""
    assert permits(license, "commercial") == commercial
    assert permits(license, "research") == research
    assert asks_for_attribution(license) == attribution


@pytest.mark.parametrize(
    ("license", "pattern", "allowed", "denied"),
    [
        ("CC-BY-4.0", "CC-BY-*", True, True),
        ("cc-by-4.0", "CC-BY-*", True, True),
        ("MIT AND GPL-3.0-only", "MIT*", False, True),
        ("MIT AND GPL-3.0-only", "GPL-*", False, True),
        ("MIT OR GPL-3.0-only", "GPL-*", True, False),
        ("MIT OR GPL-3.0-only", "MIT OR GPL-3.0-only", True, True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "GPL-2.0-only", True, True),
        ("LicenseRef-mine[1]", "LicenseRef-mine[1]", True, True),
        ("MIT", "GPL-*", False, False),
        ("", "*", True, True),
    ],
)
def test_patterns_see_through_expressions(license, pattern, allowed, denied):
    """A pattern allows an expression if it holds for a way to have it, and denies it if it holds for every way."""
    assert matches(license, pattern) == allowed
    assert touches(license, pattern) == denied
