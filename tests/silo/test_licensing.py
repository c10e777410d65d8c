"""The licence gate: what is permissive, and above all what is not."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from silo.distributions import declared_license, license_statements
from silo.documents import Document
from silo.errors import UsageError
from silo.licensing import (
    NO_LICENSE,
    Policy,
    Tier,
    is_spdx,
    load_policy,
    normalize_license,
    tier_of,
)

TIERS = {
    "CC0-1.0": Tier.PD,
    "Unlicense": Tier.PD,
    "LicenseRef-scancode-public-domain": Tier.PD,
    "LicenseRef-PublicDomain": Tier.PD,
    "LicenseRef-PublicDomain-USGov": Tier.PD,
    "MIT": Tier.SW,
    "mit": Tier.SW,
    "BSD-3-Clause": Tier.SW,
    "Apache-2.0": Tier.SW,
    "PSF-2.0": Tier.SW,
    "Apache-2.0 WITH LLVM-exception": Tier.SW,
    "CC-BY-4.0": Tier.BY,
    "CC-BY-3.0-US": Tier.BY,
    "ODC-By-1.0": Tier.BY,
    "MIT OR GPL-3.0-only": Tier.SW,
    "CC-BY-4.0 OR CC0-1.0": Tier.PD,
    "CC-BY-4.0 AND MIT": Tier.BY,
    "(MIT OR GPL-2.0-only) AND CC0-1.0": Tier.SW,
    "MIT AND GPL-3.0-only": Tier.RESTRICTED,
    "CC-BY-SA-4.0": Tier.RESTRICTED,
    "CC-BY-NC-4.0": Tier.RESTRICTED,
    "CC-BY-ND-4.0": Tier.RESTRICTED,
    "MPL-2.0": Tier.RESTRICTED,
    "LGPL-2.1-or-later": Tier.RESTRICTED,
    "GPL-2.0-only WITH Classpath-exception-2.0": Tier.RESTRICTED,
    "MIT WITH no-such-exception": Tier.RESTRICTED,
    "MIT WITH MIT": Tier.RESTRICTED,
    "Apache-2.0 WITH LicenseRef-scancode-commons-clause": Tier.RESTRICTED,
    "LLVM-exception": Tier.RESTRICTED,
    "LicenseRef-scancode-free-art-1.3": Tier.RESTRICTED,
    "CERN-OHL-1.2": Tier.RESTRICTED,
    "JSON": Tier.RESTRICTED,
    "LicenseRef-BBC-all-rights-reserved": Tier.RESTRICTED,
    "LicenseRef-PublicDomainish": Tier.RESTRICTED,
    "LicenseRef-PublicDomain-US": Tier.PD,
    "LicenseRef-PublicDomain-NC": Tier.RESTRICTED,
    "LicenseRef-PublicDomain-NonCommercial": Tier.RESTRICTED,
    "OFL-1.1": Tier.RESTRICTED,
    "OFL-1.1-no-RFN": Tier.RESTRICTED,
    "OFL-1.0": Tier.RESTRICTED,
    "MS-LPL": Tier.RESTRICTED,
    "Sendmail-Open-Source-1.1": Tier.RESTRICTED,
    "NOASSERTION": Tier.RESTRICTED,
    "NONE": Tier.RESTRICTED,
    "MIT License": Tier.RESTRICTED,
    "MIT AND": Tier.RESTRICTED,
    "MIT no-such-licence": Tier.RESTRICTED,
    "": Tier.RESTRICTED,
    " \t": Tier.RESTRICTED,
}


@pytest.mark.parametrize("license", TIERS)
def test_each_licence_has_its_tier(license):
    """Every kind of licence that the tables tell apart lands in the tier that its text asks for."""
    assert tier_of(license) is TIERS[license]


@pytest.mark.parametrize(
    "license", ["(" * 1500 + "MIT" + ")" * 1500 + "x", "MIT AND " * 10_000 + "MIT", "\0", "MIT\nMIT"]
)
def test_an_absurd_licence_is_restricted_quickly(license):
    """What no parser is built for is restricted, without an exception and without a wait."""
    assert tier_of(license) is Tier.RESTRICTED


def test_tiers_are_ordered_from_freest_to_strictest():
    """The worse of two tiers is their maximum, and the last two are closed to the weights."""
    order = [Tier.PD, Tier.SW, Tier.BY, Tier.RESTRICTED, Tier.REFUSED]
    assert sorted(order[::-1]) == order
    assert [tier.permissive for tier in Tier] == [True, True, True, False, False]


@given(st.text())
def test_any_text_has_a_tier(text):
    """No string makes the gate raise, whatever characters it holds."""
    assert isinstance(tier_of(text), Tier)
    assert isinstance(normalize_license(text), str)


WORDS = st.from_regex(r"[a-z]{3,12}", fullmatch=True).map(lambda word: f"{word}-xq")


@given(
    WORDS, st.sampled_from(["{}", "{} AND MIT", "MIT AND {}", "MIT WITH {}", "({} OR {})", "MIT {}", "LicenseRef-{}"])
)
def test_an_unknown_word_is_never_permissive(word, template):
    """An expression that hangs on a licence which the tables do not hold is restricted."""
    assert tier_of(template.format(word, word)) is Tier.RESTRICTED


@given(WORDS)
def test_an_unknown_name_is_never_guessed(word):
    """A free-form name with an unknown word in it is not read as the known licence beside it."""
    for text in (word, f"{word} MIT License", f"MIT License, {word}", f"BSD or {word}", f"License :: {word}"):
        assert not tier_of(normalize_license(text)).permissive


PARSED = [license for license in TIERS if license.strip() not in ("", "MIT License", "MIT AND", "MIT no-such-licence")]


@given(st.sampled_from(PARSED), st.sampled_from(PARSED))
def test_and_takes_the_worse_side_and_or_the_better(left, right):
    """For any two expressions that parse, AND is their maximum and OR their minimum."""
    assert tier_of(f"({left}) AND ({right})") is max(tier_of(left), tier_of(right))
    assert tier_of(f"({left}) OR ({right})") is min(tier_of(left), tier_of(right))


NAMES = {
    "MIT": "MIT",
    "apache-2.0": "Apache-2.0",
    "MIT License": "MIT",
    "The MIT License (MIT)": "MIT",
    "BSD": "BSD-3-Clause",
    "BSD 3-Clause": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "New BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "GPLv2+": "GPL-2.0-or-later",
    "GPL v2 or greater": "GPL-2.0-or-later",
    "GPL-3": "GPL-3.0-only",
    "GNU LGPL 2.1": "LGPL-2.1-only",
    "AGPLv3": "AGPL-3.0-only",
    "MPL 2.0": "MPL-2.0",
    "Public Domain": "LicenseRef-scancode-public-domain",
    "MIT/Apache-2.0": "MIT AND Apache-2.0",
    "Apache 2.0 or BSD": "Apache-2.0 OR BSD-3-Clause",
    "BSD, GPLv3": "BSD-3-Clause AND GPL-3.0-only",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: GNU Lesser General Public License v3 or later (LGPLv3+)": "LGPL-3.0-or-later",
    "License :: OSI Approved :: GNU Library or Lesser General Public License (LGPL)": "LGPL-2.0-or-later",
    "License :: Other/Proprietary License": NO_LICENSE,
    "License :: OSI Approved": NO_LICENSE,
    "MIT License (no commercial use)": NO_LICENSE,
    "Not the MIT License": NO_LICENSE,
    "CC BY 4.0（非商业）": NO_LICENSE,
    "不是 MIT": NO_LICENSE,
    "Apache 2.0 — только для некоммерческого": NO_LICENSE,
    "M\u0336I\u0336T\u0336": NO_LICENSE,
    "!MIT": NO_LICENSE,
    "MIT™ License": "MIT",
    "see LICENSE": NO_LICENSE,
    "MIT or later": NO_LICENSE,
    "GPL 9": NO_LICENSE,
    "": NO_LICENSE,
    "MIT License\n\nPermission is hereby granted, free of charge, to any person": "MIT",
    "MIT License\n\nYou may look at this.": NO_LICENSE,
    "MIT License\n\nPermission is hereby granted, free of charge, for non-commercial use": NO_LICENSE,
}


@pytest.mark.parametrize("raw", NAMES)
def test_real_metadata_reads_as_spdx(raw):
    """Each spelling seen in real metadata gives the SPDX expression it means, and an unclear one gives none."""
    assert normalize_license(raw) == NAMES[raw]


@pytest.mark.parametrize(
    ("expression", "license", "classifiers", "wanted"),
    [
        ("MIT", "", [], "MIT"),
        ("", "Apache 2.0", ["License :: OSI Approved :: Apache Software License"], "Apache-2.0"),
        ("", "", ["License :: OSI Approved :: MIT License", "Programming Language :: Python"], "MIT"),
        ("", "UNKNOWN", ["License :: OSI Approved", "License :: OSI Approved :: MIT License"], "MIT"),
        ("", "MIT", ["License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], "GPL-3.0-only"),
        ("", "", ["License :: OSI Approved :: MIT License", "License :: Other/Proprietary License"], NO_LICENSE),
        ("", "see LICENSE", ["License :: OSI Approved :: MIT License"], NO_LICENSE),
        ("", "Copyright\nRedistribution is fine.", ["License :: OSI Approved :: BSD License"], "BSD-3-Clause"),
        ("", "Copyright\nParts are under the GPL.", ["License :: OSI Approved :: BSD License"], NO_LICENSE),
        ("", "", [], NO_LICENSE),
    ],
)
def test_of_contradicting_declarations_the_strictest_counts(expression, license, classifiers, wanted):
    """A distribution is no freer than the strictest of the places in which it states its licence."""
    assert declared_license(license_statements(expression, license, classifiers)) == wanted


DOCUMENT = Document(id="a", text="b", license="GPL-3.0-only", owner="Ada", source="pypi:ada==1")


def test_a_policy_overrides_by_licence_owner_and_source(tmp_path: Path):
    """A rule for a source or an owner beats one for the licence, and of two such rules the stricter holds."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "licenses: {GPL-3.0-*: SW, MIT: restricted}\nowners: {Bob: PD}\nsources: {'pypi:bad==*': restricted}"
    )
    policy = load_policy(path)
    assert policy.tier(DOCUMENT) is Tier.SW
    assert policy.tier(replace(DOCUMENT, license="GPL-2.0-only")) is Tier.RESTRICTED
    assert policy.tier(replace(DOCUMENT, license="mit")) is Tier.RESTRICTED
    assert policy.tier(replace(DOCUMENT, license="no idea", owner="Bob")) is Tier.PD
    assert policy.tier(replace(DOCUMENT, license="MIT", owner="Bob", source="pypi:bad==2")) is Tier.RESTRICTED
    assert Policy.from_json(policy.to_json(), where="here") == policy


@pytest.mark.parametrize("spelt", ["Jos\u00e9", "Jose\u0301", "JOS\u00c9", " Jos\u00e9 "])
def test_a_rule_that_restricts_an_owner_holds_however_the_name_is_spelt(spelt):
    """Case, blanks and Unicode's forms hide no owner from a rule that restricts; one that frees is exact."""
    document = replace(DOCUMENT, license="MIT", owner=spelt)
    assert Policy(owners=(("Jos\u00e9", Tier.RESTRICTED),)).tier(document) is Tier.RESTRICTED
    freed = Policy(owners=(("Jos\u00e9", Tier.PD),)).tier(document)
    assert freed is (Tier.PD if spelt == "Jos\u00e9" else Tier.SW)


def test_a_pattern_frees_no_expression_that_merely_begins_like_it():
    """A rule for ``CC-BY-SA-*`` says nothing of the GPL that stands behind the AND."""
    policy = Policy(licenses=(("CC-BY-SA-*", Tier.BY),))
    assert tier_of("CC-BY-SA-4.0", policy) is Tier.BY
    assert tier_of("CC-BY-SA-4.0 AND GPL-3.0-only", policy) is Tier.RESTRICTED


@pytest.mark.parametrize(
    "license",
    ["MIT/GPL-3.0-only", "MIT,GPL-2.0", "MIT;GPL-2.0", "MIT|GPL-2.0", "MIT&GPL-2.0", "MIT+GPL-2.0", "MIT_GPL-2.0",
     "MIT\tAND\tGPL-3.0-only", "MIT\nGPL-3.0-only", "MIT(GPL-3.0-only)", "MIT\u00a0GPL-3.0-only"],
)  # fmt: skip
def test_a_pattern_frees_one_identifier_alone(license):
    """Whatever joins another licence to one that a pattern frees, the whole is as restricted as without the policy; a
    pattern that refuses takes in what cannot be read."""
    policy = Policy(licenses=(("MIT*", Tier.SW), ("LicenseRef-*", Tier.BY), ("Ours/*", Tier.REFUSED)))
    for each in (license, policy.read_license(license)):
        assert not tier_of(each, policy).permissive
    for known, tier in (("MIT-0", Tier.SW), ("mit+", Tier.SW), ("LicenseRef-own.1", Tier.BY), ("Ours/a", Tier.REFUSED)):
        assert tier_of(known, policy) is tier


def test_the_fingerprint_follows_the_rules():
    """Two policies share a fingerprint exactly if they say the same."""
    assert Policy().fingerprint == Policy().fingerprint
    assert Policy().fingerprint != Policy(owners=(("Ada", Tier.PD),)).fingerprint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("license: {MIT: SW}", "unknown key 'license'; expected licenses, owners, sources or evidence"),
        ("licenses: {MIT: free}", "'MIT' has tier 'free', expected one of PD, SW, BY, restricted, refused"),
        ("licenses: {MIT: [PD]}", "'MIT' has tier ['PD'], expected one of"),
        ("licenses: [MIT]", "a list, expected a mapping"),
        ("just words", "a str, expected a mapping"),
        ("a: [", "cannot be read as a YAML policy"),
    ],
)
def test_a_broken_policy_is_named(tmp_path: Path, text, complaint):
    """A policy file that cannot mean anything is refused with what it holds and what it should hold."""
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_policy(path)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)


def test_an_empty_policy_file_changes_nothing(tmp_path: Path):
    """An empty file is the default policy, and a missing one an error."""
    (tmp_path / "policy.yaml").write_text("# nothing yet\n")
    assert load_policy(tmp_path / "policy.yaml") == Policy()
    with pytest.raises(UsageError, match="does not exist"):
        load_policy(tmp_path / "other.yaml")


def test_the_papers_reading_comes_with_silo():
    """The policy named olc takes CC-BY-SA for an attribution licence, as SILO's paper did, and nothing else."""
    policy = load_policy(Path("olc"))
    assert tier_of("CC-BY-SA-4.0", policy) is Tier.BY
    assert tier_of("CC-BY-SA-4.0") is Tier.RESTRICTED
    for license in ("CC-BY-NC-SA-4.0", "GPL-3.0-only", "CC-BY-SA-4.0 AND GPL-3.0-only", "unknown"):
        assert not tier_of(license, policy).permissive
    assert policy.fingerprint != Policy().fingerprint


def test_a_policy_survives_its_file(tmp_path: Path):
    """Written as JSON and read back, a policy is the same, evidence and refusals included."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        "owners: {Grace: refused}\nevidence:\n  books/*: {license: CC-BY-NC-4.0, where: 'metadata.yaml: rights'}\n"
    )
    policy = load_policy(file)
    assert policy.evidence == (("books/*", "CC-BY-NC-4.0", "metadata.yaml: rights"),)
    assert Policy.from_json(policy.to_json(), where="here") == policy
    assert policy.tier(Document(id="a", text="b", license="MIT", owner="Grace")) is Tier.REFUSED
    file.write_text("evidence: {a: GPL}")
    with pytest.raises(UsageError, match="expected a licence and where it is said"):
        load_policy(file)


@pytest.mark.parametrize(
    ("raw", "read"),
    [("Apache 2.0", "Apache-2.0"), ("MIT OR GPL-2.0-only", "MIT OR GPL-2.0-only"), ("GPLv2+", "GPL-2.0-or-later"),
     ("ask me", "ask me"), ("", "")],
)  # fmt: skip
def test_a_declared_name_is_read_and_an_unknown_one_kept(raw, read):
    """A usual name becomes SPDX; SPDX and what nobody knows stay as they are."""
    assert Policy().read_license(raw) == read


@given(st.text(max_size=60))
def test_reading_a_name_never_frees_what_the_parser_does_not_know(raw):
    """Whatever stands in a licence field, it is permissive only if the SPDX parser knows every licence in it."""
    license = Policy().read_license(raw)
    if tier_of(license).permissive:
        assert is_spdx(license)


WORDS = st.sampled_from(
    ["MIT", "Apache", "BSD", "GPL", "CC", "BY", "SA", "NC", "License", "Public", "Domain", "AND", "OR", "WITH", "(",
     ")", "2.0", "v3", "or later", "+", "-", "/", ",", "LicenseRef-X", "non-commercial", "not", "no", "GNU", "General"]
)  # fmt: skip


@given(st.lists(WORDS, max_size=8).map(" ".join))
@example("MIT or later GNU")
def test_names_that_speak_of_copyleft_are_never_free(raw):
    """However the words of licences are strung together, a name with a restricting word in it is free only by an OR."""
    license = Policy().read_license(raw)
    if tier_of(license).permissive and "OR" not in license.upper().split():
        assert not {"GPL", "SA", "NC", "GNU", "non-commercial", "LicenseRef-X"} & set(raw.replace("-", " ").split())
