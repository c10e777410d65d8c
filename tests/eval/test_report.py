"""The report page: every number is on it, nothing of it is loaded or run, and foreign text stays text."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.report import render_html, write_report
from silo.markup import visible

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "</code></style>\"'><script>alert(1)</script><img src=http://x.example/y>&amp;$x_1$\x00\x1b\u202e\ud800-->]]>\r\n"
)


def mixed(lm, knn, ric, together):
    return {"lm": lm, "lm+knn": knn, "lm+ric": ric, "all": together}


def owner(name, before, after, **changes):
    weights = {"all": {"weights": {"lm": 0.25, "knn": 0.625, "ric": 0.125}, "temperature": 8.0}}
    row = {"owner": name, "removed": False, "test_tokens": 4000, "test_documents": 4, "before": before, "after": after}
    return row | {"weights_before": weights, "weights_after": weights} | changes


def share(method, probability, document=None, who=None):
    known = {
        "document": document,
        "owner": who,
        "license": who and "MPL-2.0",
        "title": document and f"title {document}",
    }
    return {"method": method, "probability": probability, **known}


def audited(tier, license, names):
    return {"tier": tier, "license": license, "documents": 1011, "pairs": 1012, "characters": 9, "tokens": 1013} | {
        "owners": names
    }


def build_report(**changes):
    """A report of two owners, Ada (removed) and Bob, with numbers that all differ."""
    ada = owner("Ada", mixed(411.1, 31.1, 211.1, 21.1), mixed(411.1, 399.1, 405.1, 398.1), removed=True)
    bob = owner("Bob", mixed(512.2, 32.2, 212.2, 22.2), mixed(512.2, 33.2, 213.2, 23.2))
    free = owner("permissive test text", mixed(103.3, 102.3, 101.3, 100.3), mixed(103.3, 102.4, 101.4, 100.4))
    before = {"probability": 0.83, "shares": [share("knn", 0.6, "a/x.py", "Ada"), share("lm", 0.1)], "documents": 12}
    after = {"probability": 0.15, "shares": [share("lm", 0.1), share("ric", 0.04, "b/y.py", "Bob")], "documents": 3}
    token = {"document": "a/t.py", "owner": "Ada", "position": 1234, "context": "return", "token": " self"}
    report = {
        "version": "0.1.0",
        "seed": 7,
        "audit": {
            "permissive": [
                audited("SW", "MIT", ["Cy", "Di", "Ed", "Flo", "Gus"]),
                audited("SW", "ISC", ["Hal"]),
                audited("SW", "BSD-3-Clause", ["Ian"]),
            ],
            "restricted": [audited("restricted", "MPL-2.0", ["Ada", "Bob"])],
            "found": {
                "restricted": [
                    {"reason": "its own text", "documents": 1, "examples": [{"id": "y.py", "detail": "GPL"}]}
                ],
                "cut": [],
                "stricter": [],
                "refused": [{"reason": "too short", "documents": 109, "examples": [{"id": "z.py", "detail": "3"}]}],
            },
        },
        "training": {"model": "out/model", "loss": 5.214, "steps": 195, "tokens": 798720, "parameters": 6395712}
        | {
            "documents": 644,
            "documents_by_license": {"MIT": 600, "ISC": 22, "BSD-3-Clause": 22},
            "fingerprint": "f" * 64,
        },
        "store": {"hash": "b" * 64, "lists": 1024, "codes": "sq8", "documents": 303}
        | {
            "shards": [
                {"shard": n, "owner": n, "licenses": ["MPL-2.0"], "documents": 32, "tokens": 157325, "bytes": 31159773}
                for n in ("Ada", "Bob")
            ]
        },
        "perplexity": {
            "restricted": mixed(401.4, 41.4, 301.4, 38.4),
            "permissive": mixed(103.3, 102.3, 101.3, 100.3),
            "after_removal": mixed(401.4, 141.4, 309.4, 138.4),
        },
        "owners": [ada, bob, free | {"permissive": True}],
        "attribution": [token | {"before": before, "after": after}],
        "removal": {"owner": "Ada", "documents": 32, "tokens": 157325, "receipt": "out/receipt.json"}
        | {"store_before": "b" * 64, "store_after": "a" * 64, "fresh_store": "a" * 64, "positions": 20000}
        | {"distributions_after": "d" * 64, "distributions_fresh": "d" * 64, "equal": True, "verified": True},
        "times": {"collect": 12.3, "train": 140.2, "total": 300.1},
        "peak_memory_bytes": 2_000_000_000,
    }
    return copy.deepcopy(report | changes)


def changed(path, value):
    """A report with one value replaced."""
    report = build_report()
    *parents, last = path
    place = report
    for key in parents:
        place = place[key]
    place[last] = value
    return report


def every_string(value, change):
    """A value with every string of it changed, keys and the words that the page reads apart."""
    if isinstance(value, dict):
        return {key: each if key == "method" else every_string(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [every_string(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def source():
    return render_html(build_report())


@pytest.fixture(scope="module")
def page(source, page_of):
    return page_of(source)


def test_every_perplexity_is_in_the_table(page):
    """Each perplexity of the report, before and after, stands on the page with one decimal."""
    report = build_report()
    values = [v for each in report["perplexity"].values() for v in each.values()]
    values += [v for each in report["owners"] for side in ("before", "after") for v in each[side].values()]
    cells = set(page.text[: page.text.index("logarithmic")].split())
    assert {f"{value:.1f}" for value in values} <= cells


@pytest.mark.parametrize(
    "shown",
    [
        "6,395,712",
        "798,720",
        "195 steps",
        "5.214",
        "MIT 600, BSD-3-Clause 22, ISC 22",
        "1,011",
        "1,012",
        "1,013",
        "too short 109 z.py",
        "1,024",
        "sq8",
        "303",
        "157,325",
        "31.2 MB",
        "0.625",
        "1,234",
        "0.830",
        "0.600",
        "0.040",
        "20,000",
        "300.1 s",
        "2.0 GB",
        "seed 7",
        "a" * 64,
        "b" * 64,
        "d" * 64,
        "f" * 64,
        "out/receipt.json",
        "Cy, Di, Ed and 2 more",
        "title b/y.py",
    ],
)
def test_what_else_the_report_says_is_on_the_page(page, shown):
    """Counts, hashes, weights, shares, the receipt and the cost stand on the page."""
    assert shown in page.text


def test_the_headline_gives_the_result_in_one_sentence(page):
    """The first thing said is perplexity alone, with the store, and before and after the removal."""
    assert (
        "Perplexity on 2 owners’ held-out text: 401.4 with the model alone, 38.4 with the store; "
        "Ada’s goes from 21.1 to 398.1 when it is removed."
    ) in page.text


def test_the_lowest_of_a_row_is_bold_and_the_ratio_is_to_the_model_alone():
    """Where the model alone is best, it is the model alone that is bold, and the ratio is over 1."""
    worse = mixed(100.0, 150.0, 160.0, 125.0)
    source = render_html(changed(["perplexity", "permissive"], worse) | {"owners": [owner("Ada", worse, worse)]})
    assert "<b>100.0</b>" in source
    assert "<b>125.0</b>" not in source
    assert "1.250 ×" in source


def test_the_chart_has_a_bar_for_every_value(source):
    """Four groups of four mixtures make sixteen bars, each with its value beside it."""
    chart = source[source.index("<svg") : source.index("</svg>")]
    assert len(set(re.findall(r'id="bar-\d+-\d+"', chart))) == 16
    for value in ("401.4", "38.4", "103.3", "100.3", "21.1", "398.1"):
        assert f">{value}</text>" in chart


def test_the_bars_of_a_mixture_differ_from_others_by_more_than_colour(source):
    """Three of the four mixtures have a hatch of their own, and the model alone has none."""
    chart = source[source.index("<svg") : source.index("</svg>")]
    hatches = re.findall(r"<pattern.*?</pattern>", chart, re.DOTALL)
    assert len(hatches) == 3
    assert len({re.search(r'<path d="([^"]*)"', hatch)[1] for hatch in hatches}) == 3


def test_the_chart_takes_its_colours_from_the_page(source):
    """No colour of the chart is fixed, so that it follows the page into the dark; each is one that the style has."""
    chart = source[source.index("<svg") : source.index("</svg>")]
    assert "#0102" not in chart
    for name in set(re.findall(r"var\((--[a-z]+)", chart)):
        assert f"{name}:" in source


def test_bars_are_as_long_as_their_logarithms(source):
    """A perplexity of x² has a bar twice as long as one of x."""
    squared = mixed(400.0, 20.0, 20.0, 20.0)
    source = render_html(changed(["perplexity", "restricted"], squared))
    ends = []
    for index in (0, 1):
        path = re.search(rf'id="bar-0-{index}">\s*<path d="([^"]*)"', source)[1]
        xs = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path)]
        ends.append(max(xs) - min(xs))
    assert ends[0] == pytest.approx(2 * ends[1], rel=1e-3)


def test_a_token_has_a_bar_whose_pieces_are_its_shares(page):
    """Each piece is as wide as its probability, and what is not listed is the last piece, not the empty frame."""
    widths = [attributes["style"] for name, attributes in page.elements if name == "i"]
    assert widths == [f"width:{width}%" for width in ("60.000", "10.000", "13.000", "10.000", "4.000", "1.000")]
    assert "11 other documents" in page.text
    assert "2 other documents" in page.text


def test_blanks_of_a_token_are_visible():
    """A token of a newline and two spaces is seen as such."""
    assert "<mark>↵␣␣</mark>" in render_html(changed(["attribution", 0, "token"], "\n  "))
    assert "<mark>(empty)</mark>" in render_html(changed(["attribution", 0, "token"], ""))


def test_a_long_context_keeps_its_end(page_of):
    """Of a long context the part next to the token is shown."""
    source = render_html(changed(["attribution", 0, "context"], "start" + "x" * 5000 + "end"))
    assert "xend<mark>" in source
    assert "start" not in page_of(source).text.split("position 1,234")[1][:1000]


def test_mathematics_in_a_name_is_not_typeset():
    """An owner's name with dollars in it stands in the chart as it is written."""
    source = render_html(changed(["owners", 0, "owner"], "$x^2$ & $y_$"))
    chart = source[source.index("<svg") : source.index("</svg>")]
    assert ">$x^2$ &amp; $y_$, after the removal</text>" in chart


def test_what_the_removal_takes_is_marked_where_it_is_used(page):
    """The removed owner's shard and share are marked as removed later, and no other's."""
    assert page.text.count("removed later") == 2
    assert "Ada removed later" in page.text
    assert "title a/x.py removed later" in page.text


def test_hostile_text_stays_text(page_of):
    """Markup, quotes, mathematics and controls in every string of the report make no element and stay readable."""
    hostile = every_string(build_report(), lambda text: text + HOSTILE)
    hostile["training"]["documents_by_license"] = {HOSTILE: 3}
    source = render_html(hostile)
    plain = page_of(source)
    assert {name for name, _ in plain.elements}.isdisjoint({"script", "img", "iframe", "object", "embed", "form", "a"})
    assert "<script>alert(1)</script>" in plain.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", source)
    assert source.encode().decode() == source


def test_nothing_is_loaded_and_nothing_runs(source, page):
    """No element names a resource outside the page or an event handler, and the page forbids both."""
    for name, attributes in page.elements:
        assert name not in ("script", "link", "img", "iframe", "object", "embed", "base", "image"), name
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            assert key not in ("src", "srcset", "href", "action", "data", "poster"), (name, key)
            assert key != "xlink:href" or value.startswith("#"), (name, value)
    assert not re.search(r"https?:|@import|url\((?!#)", source)
    assert "default-src 'none'" in source


def test_equal_reports_give_equal_bytes(tmp_path, source):
    """A report read back from JSON with its keys in another order, in another process, gives the same bytes."""
    (tmp_path / "report.json").write_text(json.dumps(build_report(), sort_keys=True))
    program = (
        "import json, sys, pathlib; from eval.report import write_report; folder = pathlib.Path(sys.argv[1]);"
        "write_report(json.loads((folder / 'report.json').read_text()), folder / 'report.html')"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, cwd=ROOT)
    assert (tmp_path / "report.html").read_bytes() == source.encode()


def test_the_chart_does_not_depend_on_the_user_s_settings(source):
    """Settings of matplotlib made elsewhere in the process neither change the page nor are changed by it."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "xtick.major.pad": 40, "svg.fonttype": "path", "svg.hashsalt": "x"}):
        assert render_html(build_report()) == source
        assert matplotlib.rcParams["font.size"] == 31


def test_importing_the_module_loads_no_plots():
    """matplotlib is loaded when a page is made, not before, and pyplot never."""
    program = "import sys, eval.report; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_whole_report_says_that_all_holds(source):
    """Where all checks hold, no cross is on the page."""
    assert source.count("✓") == 7
    assert "✗" not in source


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["removal", "fresh_store"], "c" * 64, "✗ not the same store"),
        (["removal", "distributions_fresh"], "c" * 64, "✗ not equal"),
        (["removal", "equal"], False, "✗ not removed exactly"),
        (["removal", "verified"], False, "✗ a file is not as its checksum says"),
        (["training", "documents_by_license"], {"MIT": 9, "GPL-3.0-only": 1}, "side of the audit: GPL-3.0-only."),
        (
            ["attribution", 0, "after", "shares", 1, "owner"],
            "Ada",
            "✗ After the removal a listed share is still Ada’s.",
        ),
    ],
)
def test_a_claim_that_fails_is_said_to_fail(path, value, said, page_of):
    """A hash, a flag, a licence or a share that contradicts a claim of the page turns it, also if the flags are set."""
    text = page_of(render_html(changed(path, value))).text
    assert said in text
    if path[0] == "removal":
        assert "✗ not removed exactly" in text
    if path[0] == "training":
        assert "✗ not only permissive" in text


def test_methods_that_were_not_used_leave_no_trace():
    """A report of lm and knn alone has two mixtures, and no column or bar for any other."""

    def cut(value):
        if isinstance(value, dict):
            return {key: cut(each) for key, each in value.items() if key not in ("all", "lm+ric")}
        return [cut(each) for each in value] if isinstance(value, list) else value

    source = render_html(cut(build_report()))
    assert len(set(re.findall(r'id="bar-\d+-\d+"', source))) == 8
    assert "All together" not in source
    assert "RIC" not in source.split("the documents behind them")[0]


def test_a_perplexity_without_bound_is_drawn_and_told(page_of):
    """An infinite or missing perplexity is shown as such and breaks neither table nor chart."""
    report = build_report()
    report["perplexity"]["restricted"] |= {"lm": float("inf"), "lm+ric": None}
    text = page_of(render_html(report)).text
    assert "∞" in text
    assert "—" in text


def test_each_wide_table_scrolls_in_a_box_that_the_keyboard_reaches(page):
    """Every table is the child of a box that scrolls, has a name and takes the focus."""
    names = [name for name, _ in page.elements]
    for index, (name, _) in enumerate(page.elements):
        if name == "table":
            box = page.elements[index - 1][1]
            assert box["class"] == "scroll"
            assert box["tabindex"] == "0"
            assert box["aria-label"]
    assert names.count("table") == 5


def test_visible_leaves_ordinary_text_alone():
    """Letters of any script, and newlines in running text, are left as they are."""
    assert visible("naïve 文字 λ\n\tif x:") == "naïve 文字 λ\n\tif x:"


def test_writing_leaves_the_whole_page_or_the_old_one(tmp_path):
    """A report that cannot be rendered leaves the page that was there."""
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report({"version": "0.1.0"}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
