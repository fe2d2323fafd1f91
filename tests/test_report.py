"""The report as text, and as a page in a headless Chromium: nothing of the data may run, load or get lost."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from browser.chromium import Chromium, find_chromium
from pydantic import ValidationError
from report_example import (
    NASTY,
    START_US,
    campaigns,
    cluster_table,
    evaluation,
    example,
    sequence,
    sequence_table,
    telescope,
)

from rayscan import schema
from rayscan.captures.scanners import Scanners
from rayscan.config import ReportConfig
from rayscan.errors import SchemaError
from rayscan.report import ReportData, activity, details, render, summarise, words
from rayscan.report.data import CAMPAIGNS, NEAR, PERIODS, POINTS
from rayscan.report.details import DETAILS
from rayscan.report.page import verdict
from rayscan.report.plots import _campaign_codes, block
from rayscan.report.summary import ACTIVITY, origins
from rayscan.report.sweep import sweep_page

ADDRESS = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}\b")


class Page(HTMLParser):
    """Elements, text and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))

    @property
    def details(self) -> dict[str, list[Any]]:
        return dict(json.loads(self.scripts[1]))


def numbers(packed: str, kind: str = "<u2") -> list[int]:
    return list(np.frombuffer(base64.b64decode(packed), kind).tolist())


def same(table: pa.Table, **values: Any) -> pa.Table:
    """The table with these values in every row."""
    for name, value in values.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array([value] * table.num_rows, table.schema.field(name).type))
    return table


def nothing(**more: Any) -> ReportData:
    """A report on nothing at all."""
    fields: dict[str, Any] = {
        "captures": schema.CAPTURES.empty_table(),
        "rejects": schema.REJECTS.empty_table(),
        "periods": PERIODS.empty_table(),
        "campaigns": CAMPAIGNS.empty_table(),
        "activity": ACTIVITY.empty_table(),
        "details": DETAILS.empty_table(),
        "near": NEAR.empty_table(),
        "evaluation": None,
        "seeds": None,
        "training": None,
        "threshold": {},
        "points": None,
    }
    return example(**(fields | more))


@pytest.fixture(scope="module")
def data() -> ReportData:
    return example()


@pytest.fixture(scope="module")
def page(data: ReportData) -> Page:
    return Page(render(data))


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (words.number(1234567), "1,234,567"),
        (words.number(None), "–"),
        (words.count(1, "source"), "1 source"),
        (words.percent(0.0), "0%"),
        (words.percent(1e-6), "under 0.01%"),
        (words.percent(0.0004), "0.04%"),
        (words.percent(0.042), "4.2%"),
        (words.percent(0.5), "50%"),
        (words.percent(0.9996), "over 99.9%"),
        (words.percent(1.0), "100%"),
        (words.percent(float("nan")), "–"),
        (words.ratio(1, 0), "–"),
        (words.figure(-0.25), "−0.250"),
        (words.duration(0), "0 seconds"),
        (words.duration(640), "640 microseconds"),
        (words.duration(1_000_000), "1 second"),
        (words.duration(5_400_000_000), "1.5 hours"),
        (words.duration(23 * 3_600_000_000), "23 hours"),
        (words.duration(12 * 86_400_000_000), "12 days"),
        (words.duration(None), "–"),
        (words.size(999), "999 bytes"),
        (words.size(48_000_000), "48.0 MB"),
        (words.address(0), "0.0.0.0"),
        (words.address(0xC0A80102), "192.168.1.2"),
        (words.address(0xFFFFFFFF), "255.255.255.255"),
        (words.port(6, 23), "23/tcp"),
        (words.port(1, 8), "icmp type 8"),
        (words.port(99, 7), "7/protocol 99"),
        (words.port(17, None), "udp, no port"),
        (words.port(None, None), "unknown protocol, no port"),
        (words.instant(datetime(2024, 3, 1, 1, tzinfo=UTC)), "2024-03-01 01:00:00 UTC"),
        (words.span(datetime(2024, 3, 1, tzinfo=UTC), datetime(2024, 3, 3, tzinfo=UTC)), "2 days"),
    ],
)
def test_words(got: str, expected: str) -> None:
    assert got == expected


# ---------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------


def test_the_verdict_comes_first(page: Page) -> None:
    order = (
        "400 sources in 2024-03, in 6 campaigns",
        "rows could not be read",
        "AUROC",
        "From rows to campaigns",
    )
    places = [page.text.find(text) for text in order]
    assert places == sorted(places) and places[0] > 0


@pytest.mark.parametrize(
    ("scores", "tone", "ending"),
    [
        (evaluation(0.982, 0.867), "good", "for the port floor: clearly above it."),
        (evaluation(0.875, 0.867), "plain", "above it, but the intervals overlap."),
        (evaluation(0.800, 0.867), "bad", "no better than counting ports."),
        (None, "bad", "how far these campaigns can be trusted is unknown."),
        ({**evaluation(), "parts": {}}, "bad", "could not be scored on unseen sources: see why below."),
    ],
)
def test_verdict_on_trust(scores: dict[str, Any] | None, tone: str, ending: str) -> None:
    sentence = verdict(example(evaluation=scores))[2]
    assert sentence["tone"] == tone and sentence["text"].endswith(ending)


def test_verdict_without_intervals_or_floor() -> None:
    scores = evaluation()
    methods = scores["parts"]["unseen sources"]["methods"]
    methods["model"]["auroc"]["low"] = None
    assert "unknown uncertainty" in verdict(example(evaluation=scores))[2]["text"]
    del methods["ports"]
    assert "is missing" in verdict(example(evaluation=scores))[2]["text"]
    render(example(evaluation=scores))


def test_verdict_counts_what_was_lost(data: ReportData) -> None:
    assert verdict(data)[1]["text"] == (
        "0.8% of 28,692 rows could not be read, 0.8% were left out. 1 file could not be read at all."
    )
    cut = data.rejects.set_column(5, "lost", pa.array(["rows"] * 4 + ["rest"] * 2 + ["file"]))
    assert verdict(replace(data, rejects=cut))[1]["text"].endswith(
        "1 file could not be read at all. 2 files could be read in part only."
    )
    clean = replace(data, captures=data.captures.slice(0, 0), rejects=data.rejects.slice(0, 0))
    assert verdict(clean)[1]["text"] == "No rows were read."


# ---------------------------------------------------------------------------------------------
# The page as text
# ---------------------------------------------------------------------------------------------


def test_sentences_stand_apart(data: ReportData) -> None:
    text = render(
        replace(data, campaigns=same(data.campaigns, labelled=0, zmap=None, masscan=None, mirai=None))
    )
    assert "No capture labels its sources. No capture records what" in text
    assert "Mirai. No list of known" in text
    both = " ".join(Page(render(replace(two_periods(), show_sources=False))).text.split())
    assert "was last there. 40 sequences stayed alone and are not listed. Addresses and networks" in both


def test_sections_are_in_order(page: Page) -> None:
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["read", "campaigns", "map", "history", "trust", "run"]


def test_what_was_read_adds_up(data: ReportData, page: Page) -> None:
    text = " ".join(page.text.split())
    assert (
        "Rows that could not be read 240 0.8% Rows left out 240 0.8%" in text
        and "Sequences in campaigns 583 94%" in text
    )
    assert "IPv6 is not read yet first in telescope/2024-03-01.pcap.gz at 1,234,567 240 6" in text
    assert "truncated gzip stream first in telescope/2024-03-29.pcap.gz – 1 IPv6" in text
    assert "1 file could not be read at all, 0 files only up to some place." in text
    assert "telescope/2024-03-29.pcap.gz unknown not read 54.0 MB 0 0" in text


def test_figures_stand_beside_their_floors(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "same source AUROC 0.982 0.972 to 0.992 0.867 0.857 to 0.877 0.503" in text
    assert "same label 3-nearest-neighbour macro-F1 0.882" in text
    assert "4,000 pairs of one source and 20,000 pairs of different sources, weighted as if 50%" in text
    assert "off by 3.1% on average" in text
    assert "same label, other networks (/24) AUROC 0.932 0.922 to 0.942 0.817" in text
    assert "validation / labels: no label has 5 sources or more" in text
    below = " ".join(Page(render(example(evaluation=evaluation(0.8, 0.867)))).text.split())
    assert "AUROC 0.800 not above the floor" in below


def test_agreement_has_intervals_as_far_as_there_are(page: Page) -> None:
    text = " ".join(page.text.split())
    assert (
        "2024-03 source 900 80 0.550 0.550 to 0.600 0.710 0.720 0.700 to 0.740 "
        "0.910 0.900 to 0.920 0.420 0.570 0.500 to 0.600" in text
    )
    assert "0.420 0.570 0.400 to 0.700" in text  # against labels: pairs of different sources
    scores = evaluation()
    del scores["clusters"]["periods"]["2024-03"]["by_source"]["intervals"]  # as older evaluations are
    older = " ".join(Page(render(example(evaluation=scores))).text.split())
    assert "2024-03 source 900 80 0.550 0.710 0.720 0.910 0.420 0.570" in older


def test_figures_over_seeds_are_told(data: ReportData, page: Page) -> None:
    text = " ".join(page.text.split())
    assert "3 models, of seeds 0, 1, 2 " in text and "other settings than this run" not in text
    assert "unseen sources source 0.981 ± 0.004 0.976 to 0.986 0.660 ± 0.004" in text
    assert "0.905 to 0.915, of 2 seeds" in text
    other = Page(render(replace(data, config_hash="another"))).text
    assert "with other settings than this run" in other
    assert "Over seeds" not in Page(render(replace(data, seeds=None))).text


def test_only_its_own_scripts_may_run(page: Page) -> None:
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[2:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "default-src 'none'" in policy and "unsafe-inline'; img" in policy and "eval" not in policy


def test_the_page_points_nowhere(page: Page) -> None:
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "action")]
    assert all(value and value.startswith(("#", "data:")) for value in addresses)
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]


def test_texts_from_the_data_stay_texts() -> None:
    rejects = pa.table(
        {
            "capture": ["c"] * 4,
            "path": NASTY,
            "offset": [0] * 4,
            "reason": NASTY,
            "count": [1] * 4,
            "lost": NASTY,
        },
        schema=schema.REJECTS,
    )
    files = same(example().captures.slice(0, 1), path=NASTY[0], format=NASTY[1])
    nasty = example(
        labels=NASTY, captures=files, rejects=rejects, title=NASTY[0], config_yaml=NASTY[1], run=NASTY[3]
    )
    page = Page(render(nasty))
    assert [tag for tag, _ in page.tags].count("script") == 7
    assert not {"img"} & {tag for tag, _ in page.tags}
    assert all((attrs["href"] or "").startswith("#") for tag, attrs in page.tags if tag == "a")
    assert all(text in page.text for text in NASTY[:2])
    assert {name for labels in page.data["table"]["labels"] for name, _ in labels} >= set(NASTY)


def test_block_holds_no_markup_and_loses_nothing() -> None:
    payload = {"texts": [*NASTY, "]]>&amp;"], "numbers": [1.5, None, 3]}
    text = str(block({**payload, "odd": [float("nan"), float("inf")]}))
    assert not set(text) & set("<>&")
    assert json.loads(text) == {**payload, "odd": [None, None]}


def test_addresses_can_be_withheld(data: ReportData, page: Page) -> None:
    assert ADDRESS.search(page.scripts[1]) and page.data["points"]["src"]
    hidden = Page(render(replace(data, show_sources=False)))
    assert not ADDRESS.search(hidden.scripts[0] + hidden.scripts[1] + hidden.text)
    assert hidden.data["points"]["src"] is None
    assert "Addresses and networks are withheld" in hidden.text


def test_nothing_at_all_is_a_page() -> None:
    text = Page(render(nothing())).text
    for sentence in (
        "Nothing was read: no period holds a flow.",
        "No rows were read.",
        "Nothing was rejected or left out.",
        "There are no campaigns.",
        "No embeddings were given to this report.",
        "Nothing was evaluated.",
        "No training curve was given to this report.",
    ):
        assert sentence in text


def test_one_source_alone() -> None:
    rows, groups = sequence_table([sequence(0, 1)]), cluster_table([0], [0])
    periods = pa.table(
        {"period": ["all"], "flows": [2], "sources": [1], "sequences": [1], "dropped_flows": [0]}
    )
    text = Page(render(nothing(periods=periods, campaigns=campaigns(summarise(rows, groups, "all"))))).text
    assert "1 source in all, in 0 campaigns; 1 sequence stayed alone." in text
    assert "each of the 1 sequence stayed alone" in text


def test_unlabelled_captures_say_so() -> None:
    plain = example(labels=(None,) * 6)
    unmarked = same(plain.campaigns, **dict.fromkeys(schema.FINGERPRINTS))
    page = Page(render(replace(plain, campaigns=unmarked)))
    text = page.text
    assert page.data["flags"] == {"labels": False, "scanners": False, "tools": []}
    assert "label" not in page.data["points"]["by"]
    assert "No capture labels its sources." in text and "No capture records what shows the tools" in text


def many_campaigns(n: int) -> pa.Table:
    """So many campaigns of one month, the last the largest; ten of them are sequences that stayed alone."""
    at = pa.array([datetime(2024, 3, 1, tzinfo=UTC)] * n, schema.TIME)
    columns: dict[str, Any] = dict.fromkeys(CAMPAIGNS.names, np.full(n, 2))
    columns |= {
        field.name: pa.nulls(n, field.type) for field in CAMPAIGNS if not pa.types.is_integer(field.type)
    }
    columns |= {"period": ["2024-03"] * n, "cluster": np.arange(n), "first": at, "last": at, "began": at}
    columns |= {
        "campaign": [f"2024-03-{i:x}" for i in range(n)],
        "event": ["born"] * n,
        "absent": np.zeros(n),
    }
    columns["sources"] = np.arange(n)
    columns["sequences"] = np.r_[np.ones(10, np.int64), np.full(n - 10, 2)]
    return pa.table(columns, schema=CAMPAIGNS)


def test_many_campaigns_are_counted_not_listed() -> None:
    n = 100_000
    page = Page(render(example(campaigns=many_campaigns(n), points=None, max_clusters=20)))
    assert {len(column) for column in page.data["table"].values()} == {20}
    assert {len(column) for column in page.details.values()} == {20}
    assert page.data["ids"][0] == f"2024-03-{99_999:x}"  # the most sources
    text = " ".join(page.text.split())
    assert "in 99,990 campaigns; 10 sequences stayed alone." in text
    assert "99,970 smaller campaigns are not listed." in text
    assert "10 sequences stayed alone and are not listed." in text
    assert page.data["sizes"] == {"low": [1, 2], "clusters": [10, n - 10], "sequences": [10, 2 * (n - 10)]}


def point_table(**more: Any) -> pa.Table:
    columns = {
        "x": [0.0, float("nan"), 1.0, 0.0],
        "y": [0.0, 1.0, float("inf"), 2.0],
        "period": ["2024-03"] * 4,
        "cluster": [0, 2, None, None],
        "src": [1, 2, 3, 2**32 - 1],
        "start": [START_US, START_US, START_US, START_US + 10 * 86_400_000_000],
        "label": ["a", None, None, None],
        "scanner": [None] * 4,
        "port": [23, None, None, None],
        "strange": [False, False, False, True],
    }
    return pa.table(columns | more, schema=POINTS)


def test_points_without_a_place_are_counted() -> None:
    points = Page(render(example(points=point_table()))).data["points"]
    assert (points["n"], points["left"], points["strange"]) == (2, 2, 1)
    assert numbers(points["src"], "<u4") == [1, 2**32 - 1]


def test_points_keep_their_proportions() -> None:
    """x spans 1 and y 2, so y fills the range and x the middle half of it."""
    points = Page(render(example(points=point_table(x=[0.0, 1.0, 1.0, 0.0], y=[0.0, 0.0, 2.0, 2.0])))).data[
        "points"
    ]
    assert numbers(points["y"]) == [0, 0, 65535, 65535]
    x = numbers(points["x"])
    assert x[0] == x[3] == pytest.approx(65535 / 4, abs=1) and x[1] == pytest.approx(3 * 65535 / 4, abs=1)


def test_what_colours_the_map(page: Page) -> None:
    by = page.data["points"]["by"]
    assert by["campaign"]["shown"] == 6 == len(page.data["campaigns"])
    assert max(numbers(by["campaign"]["codes"])) == 6  # those that stayed alone
    labels = by["label"]
    assert labels["names"][-1] == "no label" and labels["shown"] == len(labels["names"]) - 1
    assert "scanner" not in by
    times = Page(render(example(points=point_table(x=[0.0] * 4, y=[0.0] * 4)))).data["points"]["by"]["time"]
    assert times["names"][0] == "2024-03-01" and times["names"][-1] == "2024-03-10"
    assert numbers(times["codes"]) == [0, 0, 0, 9]


def test_the_map_has_a_code_for_every_campaign_that_may_have_a_row(data: ReportData) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 50000"):
        ReportConfig(max_clusters=50_001)
    keys = [("2024-03", cluster) for cluster in range(50_000)]
    points = point_table(cluster=[0, 49_999, 50_000, None])
    codes = numbers(_campaign_codes(points, keys, list(range(50_000)))["codes"])
    assert codes == [0, 49_999, 50_000, 50_001]


def test_activity_shown_is_all_there_is(data: ReportData, page: Page) -> None:
    shown = sum(sum(line[1:]) for series in page.data["activity"] for line in series["lines"])
    assert shown == sum(data.activity["flows"].to_pylist())
    assert [series["campaign"] for series in page.data["activity"]] == [0, 1, 2, 3, 4, 5, None]
    lines = page.data["table"]["line"]
    assert [sum(line[1:]) for line in lines] == page.data["table"]["flows"]


def test_details_of_a_campaign_add_up(page: Page) -> None:
    flows = page.data["table"]["flows"]
    details = page.details
    assert [sum(hours) for hours in details["hours"]] == flows
    assert all(1 <= n <= s16 <= s24 for n, s16, s24 in zip(
        details["slash8"], details["slash16"], page.data["table"]["networks"], strict=True
    ))  # fmt: skip
    assert [len(said) for said in details["said"]] == [3] * 6
    assert re.fullmatch(
        r"\d+ flows within .* from 2024-03-.* UTC, "
        r"to (23|2323)/tcp \(\d+\) and (23|2323)/tcp \(\d+\), \d+ destinations, "
        r"usually .* apart; mark of Mirai on 9\d(\.\d)?% of them",
        details["said"][0][0][1],
    )
    assert all(row is not None for near in details["near"] for row, _ in near)


def test_a_missing_column_is_named(data: ReportData) -> None:
    with pytest.raises(SchemaError, match="table campaigns lacks ports"):
        render(replace(data, campaigns=data.campaigns.drop_columns(["ports"])))


def test_an_evaluation_of_another_version_is_refused(data: ReportData) -> None:
    with pytest.raises(SchemaError, match="layout version 2"):
        render(replace(data, evaluation={**evaluation(), "version": 2}))


def test_the_same_data_give_the_same_page(data: ReportData) -> None:
    assert render(data) == render(example())


# ---------------------------------------------------------------------------------------------
# The page in a browser
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium: install it (Debian: chromium) or name it in RAYSCAN_CHROMIUM")
    browser = Chromium(binary)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def opened(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Chromium:
    """A report with hostile labels, over two periods, open in the browser."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(two_periods(NASTY)), "utf-8")
    chromium.view(1200, 900)
    chromium.open(path)
    return chromium


def two_periods(labels: tuple[str, ...] = ()) -> ReportData:
    """The example, and a month later: two campaigns continued, one split off, one merged and one gone."""
    first = example(labels=labels)
    now = same(first.campaigns, period="2024-04", event="continued").slice(0, 3).to_pylist()
    now[1]["sources"] = 2 * now[1]["sources"]
    now[2] |= {"event": "split", "campaign": "2024-04-77", "relative": now[0]["campaign"]}
    ended = first.campaigns.slice(4, 2).to_pylist()
    counts = dict.fromkeys(("sequences", "sources", "networks", "flows", "labelled"), 0)
    gone = {"period": "2024-04", "cluster": None, "absent": 1, **counts}
    ended[0] |= {**gone, "event": "merged", "relative": now[1]["campaign"]}
    ended[1] |= {**gone, "event": "gone"}
    later = pa.Table.from_pylist([*now, *ended], CAMPAIGNS)
    more = {
        name: pa.concat_tables([table, same(table, period="2024-04").cast(table.schema)])
        for name in ("periods", "activity", "details", "near")
        for table in [getattr(first, name)]
    }
    return replace(first, campaigns=pa.concat_tables([first.campaigns, later]), **more)


ROWS = "[...document.querySelectorAll('#campaign-table tbody tr[data-row]')]"


def cells(browser: Chromium, column: int) -> list[str]:
    return list(browser.ask(f"{ROWS}.map((r) => r.cells[{column}].textContent.trim())"))


def head(browser: Chromium, column: int) -> str | None:
    """Press a heading; what the column says of its order then."""
    cell = f"document.querySelectorAll('#campaign-table thead th')[{column}]"
    browser.ask(f"{cell}.querySelector('button').click()")
    return browser.ask(f"{cell}.getAttribute('aria-sort')")


def type_filter(browser: Chromium, text: str) -> list[str]:
    field = "document.getElementById('filter')"
    browser.ask(f"{field}.value = {json.dumps(text)}; {field}.dispatchEvent(new Event('input'))")
    return cells(browser, 0)


def test_the_page_is_quiet_and_loads_nothing(opened: Chromium) -> None:
    assert opened.ask("document.documentElement.dataset.ready") == "true"
    assert opened.problems == []
    assert len(opened.requests) == 1 and opened.requests[0].startswith("file://")
    opened.ask("Charts.everything()")
    assert opened.ask("document.querySelectorAll('.canvas .main-svg').length") >= 7


def test_hostile_labels_do_not_run(opened: Chromium) -> None:
    opened.ask("document.querySelector('#campaign-table tbody button').click()")
    labels = opened.ask("[...document.querySelectorAll('tr.open .bars dt')].map((e) => e.textContent)")
    assert NASTY[0] in labels
    assert opened.ask("document.querySelectorAll('img, main a, [onerror]').length") == 0
    assert opened.ask("typeof window.broken") == "undefined" and opened.problems == []
    opened.ask("document.querySelector('#campaign-table tbody button').click()")


def test_a_policy_stands_behind_the_escaping(opened: Chromium) -> None:
    """Even markup that got into the page would not run."""
    assert opened.ask(
        "new Promise((done) => { const e = document.createElement('div');"
        'e.innerHTML = \'<img src="data:," onerror="window.broken = 1">\'; document.body.append(e);'
        "setTimeout(() => { e.remove(); done(typeof window.broken); }, 200); })"
    ) == ("undefined")
    assert len(opened.problems) == 1 and "Content Security Policy" in opened.problems.pop()


def choose(browser: Chromium, field: str, value: str) -> None:
    browser.ask(f"{{const s = document.getElementById('{field}'); s.value = '{value}';"
                "s.dispatchEvent(new Event('change'))}")  # fmt: skip


def everything(browser: Chromium) -> None:
    """All rows of all periods, closed."""
    type_filter(browser, "")
    choose(browser, "period", "")


def test_rows_sort_by_number_and_back(opened: Chromium) -> None:
    choose(opened, "period", "2024-03")
    sequences = [int(text.replace(",", "")) for text in cells(opened, 3)]
    assert len(sequences) == 6
    assert head(opened, 3) == "descending"
    assert [int(text) for text in cells(opened, 3)] == sorted(sequences, reverse=True)
    assert head(opened, 3) == "ascending"
    assert [int(text) for text in cells(opened, 3)] == sorted(sequences)
    assert opened.ask("document.querySelectorAll('#campaign-table [aria-sort]').length") == 1
    assert head(opened, 5) == "ascending"
    assert cells(opened, 5)[0].startswith("22/tcp")
    choose(opened, "period", "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", 9),
        ("5060/udp 2323/tcp", 0),
        ("5060/udp", 1),
        ("<SCRIPT>window", 2),
        ("sources>=48", 3),
        ("sources<48 mirai>90%", 0),
        ("mirai>90%", 2),
        ("change:split", 1),
        ("change:grown", 1),
        ("change:shrunk", 0),
        ("first>2024-03-25", 0),
        ("first>2024-02-29T23:59", 9),
        ("last<2024-03-02t12:30:00z", 0),
        ("campaign:2024-04-77", 1),
        ("last<2024-05-01 port:23/tcp", 2),
        ("port:no-such-port", 0),
    ],
)
def test_rows_filter_by_words_and_conditions(opened: Chromium, text: str, found: int) -> None:
    everything(opened)
    assert len(type_filter(opened, text)) == found
    assert ("filtered out" in opened.ask("document.getElementById('shown').textContent")) == (found < 9)
    assert opened.ask("document.getElementById('wrong').textContent") == ""


def test_a_condition_that_makes_no_sense_is_named(opened: Chromium) -> None:
    everything(opened)
    assert len(type_filter(opened, "sources>many 22/tcp")) == 2
    wrong = "document.getElementById('wrong').textContent"
    assert opened.ask(wrong) == "Not understood: sources>many"
    for text, said in (
        ("first>15", "Not understood: first>15"),
        ("known>0", "This report has no column known."),
        ("scanner:shodan", "This report has no column scanner."),
        (
            "soruces>5",
            "No column is called soruces; there are change, sources, sequences, flows, port, label",
        ),
    ):
        assert len(type_filter(opened, text)) == 9 and opened.ask(wrong).startswith(said)
    assert type_filter(opened, "unknown:word") == [] and opened.ask(wrong) == ""  # a label may hold a colon


TABBED = "(() => { const e = document.activeElement; return [e.tagName, e.textContent, e.className]; })()"


def tab_to(browser: Chromium, selector: str) -> None:
    """Press Tab until the focus is on such an element."""
    for _ in range(60):
        browser.press("Tab")
        if browser.ask(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"no {selector} after 60 times Tab, but {browser.ask(TABBED)}")


def test_the_table_is_worked_by_keyboard(opened: Chromium) -> None:
    everything(opened)
    choose(opened, "period", "2024-03")
    opened.ask("document.getElementById('filter').focus()")
    tab_to(opened, "#campaign-table th:nth-child(4) button")
    order = "document.activeElement.closest('th').getAttribute('aria-sort')"
    opened.press("Enter")
    assert opened.ask(order) == "descending"
    opened.press("Enter")
    assert opened.ask(order) == "ascending"
    assert cells(opened, 3) == sorted(cells(opened, 3), key=int)
    tab_to(opened, "#campaign-table tbody tr:first-child button")
    expanded = "document.activeElement.getAttribute('aria-expanded')"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    opened.press("Enter")
    assert opened.ask(expanded) == "true" and opened.ask(outline) == "solid"
    assert opened.ask("document.querySelectorAll('tr.open').length") == 1
    tab_to(opened, "tr.open .detail > div > div:last-child > .near button")
    opened.press("Enter")  # to a neighbour, which takes the focus
    assert opened.ask("document.querySelectorAll('tr.open').length") == 2
    assert opened.ask(expanded) == "true"
    opened.press("Enter")
    assert opened.ask(expanded) == "false"
    everything(opened)
    assert opened.problems == []


def test_the_map_is_worked_by_keyboard(opened: Chromium) -> None:
    opened.ask("document.getElementById('map-all').focus()")
    tab_to(opened, ".map canvas")
    opened.ask(FRAME)
    picture = "document.querySelector('.map canvas').toDataURL()"
    seen = [opened.ask(picture)]
    for key in ("+", "ArrowLeft", "ArrowUp", "-"):
        opened.press(key)
        opened.ask(FRAME)
        seen.append(opened.ask(picture))
    assert len(set(seen)) == len(seen)
    opened.press("0")
    opened.ask(FRAME)
    assert opened.ask(picture) == seen[0]
    assert opened.problems == []


def test_the_newest_period_comes_first(opened: Chromium) -> None:
    assert opened.ask("document.getElementById('period').options[0].value") == "2024-04"
    everything(opened)
    choose(opened, "period", "2024-04")
    assert sorted(cells(opened, 1)) == ["as many", "grown × 2.0", "split off"]


def test_a_row_opens_and_closes(opened: Chromium) -> None:
    everything(opened)
    button = f"{ROWS}[0].querySelector('button')"
    state = f"{button}.getAttribute('aria-expanded')"
    assert opened.ask(state) == "false"
    opened.ask(f"{button}.click()")
    assert opened.ask(state) == "true"
    assert opened.ask(f"document.getElementById({button}.getAttribute('aria-controls')).tagName") == "TR"
    detail = opened.ask("document.querySelector('tr.open').innerText")
    assert "Usual gap of a source" in detail and ADDRESS.search(detail)
    assert "Its most typical sequences" in detail and "Nearest campaigns" in detail
    assert opened.ask("document.querySelectorAll('tr.open .main-svg').length") >= 2
    head(opened, 2)  # details move with their row
    assert opened.ask("document.querySelector('tr.open').previousElementSibling.cells[0].querySelector"
                      "('button').getAttribute('aria-expanded')") == "true"  # fmt: skip
    opened.ask("document.querySelector('#campaign-table [aria-expanded=true]').click()")
    assert opened.ask("document.querySelectorAll('tr.open').length") == 0


def test_campaigns_lead_to_each_other(opened: Chromium) -> None:
    """From a neighbour and from the timeline to the row, open and in focus; from the row to the map."""
    everything(opened)
    opened.ask(f"{ROWS}[0].querySelector('button').click()")
    opened.ask("document.querySelector('tr.open .near li:last-child button').click()")
    assert opened.ask("document.querySelectorAll('tr.open').length") == 2
    type_filter(opened, "no such row")
    opened.ask("document.querySelector('.history [data-period=\"2024-04\"]').click()")
    assert opened.ask("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert (
        opened.ask("document.activeElement.closest('tr').querySelector('small').textContent") == "in 2024-04"
    )
    opened.ask("document.querySelector('tr.open .plain-button').click()")
    assert opened.ask("document.querySelectorAll('#map-legend button').length") == 2
    opened.ask("document.getElementById('map-all').click()")
    opened.ask("for (const b of document.querySelectorAll('#campaign-table [aria-expanded=true]')) b.click()")


def test_the_timeline_tells_what_became_of_campaigns(opened: Chromium) -> None:
    text = opened.ask("document.querySelector('.history').innerText")
    for said in ("new", "split off from 2024-03-1", "merged into 2024-03-2", "gone", "grown × 2.0"):
        assert said in text
    told = opened.ask("document.querySelector('#history .plot + .note').textContent")
    assert told.startswith("In 2024-04: 1 grown, 1 continued, 1 split, 1 merged and 1 gone. Grown means half")
    names = opened.ask("Charts.events(Charts.theme()).data.map((trace) => trace.name)")
    assert {"grown", "shrunk"} < set(names)


INK = """(() => { const c = document.querySelector('.map canvas'), copy = document.createElement('canvas');
  copy.width = c.width; copy.height = c.height;
  const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(c, 0, 0);
  return pen.getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length; })()"""
FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def test_the_map_draws_hides_and_describes(opened: Chromium) -> None:
    opened.ask(FRAME)
    before = opened.ask(INK)
    assert before > 1_000
    opened.ask("document.querySelector('#map-legend button').click()")
    opened.ask(FRAME)
    assert 0 < opened.ask(INK) < before
    opened.ask("document.querySelector('#map-legend button').click()")
    opened.ask("{const s = document.getElementById('colour'); s.value = 'label';"
               "s.dispatchEvent(new Event('change'))}")  # fmt: skip
    legend = opened.ask("document.getElementById('map-legend').textContent")
    assert all(text in legend for text in NASTY) and "no label" in legend
    tip = opened.ask(
        "(() => { const c = document.querySelector('.map canvas'), t = document.querySelector('.tip');"
        "for (let x = 0; x < c.clientWidth; x += 8) for (let y = 0; y < c.clientHeight; y += 8) {"
        "c.dispatchEvent(new PointerEvent('pointermove', {clientX: x + c.getBoundingClientRect().x,"
        "clientY: y + c.getBoundingClientRect().y}));"
        "if (!t.hidden && t.textContent.includes('<script>window')) return t.innerText; } })()"
    )
    assert f"label {NASTY[0]}" in tip and "source " in tip
    assert opened.problems == []


CONTRASTS = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = c[i] / 255;
    return sum + weight * (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((part, i) => part * a + below[i] * (1 - a));
  const path = (e) => (e ? [...path(e.parentElement), e] : []);
  const found = {};
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest('script, noscript, .skip, .hidden')) continue;
    let below = [255, 255, 255];
    let opacity = 1;
    for (const one of path(e)) {
      const style = getComputedStyle(one);
      below = over(channels(style.backgroundColor), below);
      opacity *= Number(style.opacity);
    }
    const style = getComputedStyle(e);
    const colour = channels(e instanceof SVGElement ? style.fill : style.color);
    const ink = over([...colour.slice(0, 3), (colour[3] ?? 1) * opacity], below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    const key = `${e.tagName} ${e.getAttribute('class')} ${e.textContent.trim().slice(0, 30)}`;
    found[key] = Math.min((a + 0.05) / (b + 0.05), found[key] ?? Infinity);
  }
  return found;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_can_be_read(opened: Chromium, dark: bool) -> None:
    """Contrast of 4.5 at least (WCAG 2.1, AA), with all open that can be opened, and a group hidden."""
    opened.view(1200, 900, dark=dark)
    everything(opened)
    opened.ask("for (const e of document.querySelectorAll('details')) e.open = true")
    opened.ask(f"{ROWS}[0].querySelector('button').click()")
    opened.ask("document.querySelector('#map-legend button').click()")
    opened.ask("Charts.everything()")
    opened.ask(FRAME)
    found = opened.ask(CONTRASTS)
    opened.ask("document.querySelector('#map-legend button').click()")
    opened.ask(f"{ROWS}[0].querySelector('button').click()")
    opened.view(1200, 900)
    assert len(found) > 200
    assert {text: contrast for text, contrast in found.items() if contrast < 4.5} == {}


def test_the_map_looks_the_same_without_webgl(chromium: Chromium, tmp_path: Path) -> None:
    """Drawn by WebGL and by the 2-D canvas: as many pixels, within what smoothing of edges makes."""
    path = tmp_path / "report.html"
    path.write_text(render(example()), "utf-8")
    without = (
        "HTMLCanvasElement.prototype.getContext = new Proxy(HTMLCanvasElement.prototype.getContext,"
        "{apply: (f, c, a) => a[0] === 'webgl' ? null : Reflect.apply(f, c, a)})"
    )
    inked = []
    for script in ("", without):
        chromium.open(path, before=script)
        chromium.ask(FRAME)
        painter = chromium.ask("document.querySelector('.map canvas').dataset.painter")
        inked.append((painter, chromium.ask(INK)))
    assert [painter for painter, _ in inked] == ["webgl", "canvas"]
    assert inked[0][1] == pytest.approx(inked[1][1], rel=0.25)
    assert chromium.problems == []


def test_dark_and_light_follow_the_reader(opened: Chromium) -> None:
    opened.ask("Charts.everything()")
    tick = "getComputedStyle(document.querySelector('#plot-training .xtick text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    light = opened.ask(tick), opened.ask(paper)
    opened.view(1200, 900, dark=True)
    opened.ask(FRAME)
    dark = opened.ask(tick), opened.ask(paper)
    opened.view(1200, 900)
    assert light[0] != dark[0] and light[1] != dark[1]


def test_the_last_press_of_show_more_leaves_the_focus_on_a_row(chromium: Chromium, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(
        render(example(campaigns=many_campaigns(310), points=None)), "utf-8"
    )
    chromium.view(1200, 900)
    chromium.open(tmp_path / "report.html")
    assert len(cells(chromium, 0)) == 50
    chromium.ask("document.getElementById('more').focus()")
    chromium.press("Enter")
    assert len(cells(chromium, 0)) == 250 and chromium.ask("document.activeElement.id") == "more"
    chromium.press("Enter")
    assert len(cells(chromium, 0)) == 300 and chromium.ask("document.getElementById('more').hidden")
    assert chromium.ask("document.activeElement.closest('tr').sectionRowIndex") == 250
    assert chromium.problems == []


def test_everything_is_one_campaign(chromium: Chromium, tmp_path: Path) -> None:
    sequences, _ = telescope(0)
    ids = sequences["sequence_id"].to_pylist()
    clusters = cluster_table(ids, [0] * len(ids))
    found = {
        "campaigns": campaigns(summarise(sequences, clusters, "2024-03")),
        "activity": activity(sequences, clusters, "2024-03", top=100),
        "details": details(sequences, clusters, "2024-03", 100),
        "near": pa.table({"period": ["2024-03"], "cluster": [0], "near": [[]]}, schema=NEAR),
        "points": same(example().points, cluster=0),
    }
    page = render(example(**found))
    assert "in 1 campaign.</p>" in page and "stayed alone and" not in page
    (tmp_path / "report.html").write_text(page, "utf-8")
    chromium.view(1200, 900)
    chromium.open(tmp_path / "report.html")
    chromium.ask("Charts.everything()")
    chromium.ask(f"{ROWS}[0].querySelector('button').click()")
    assert "No other campaign has a row." in chromium.ask("document.querySelector('tr.open').innerText")
    chromium.ask(FRAME)
    assert chromium.ask(INK) > 1_000
    assert chromium.ask("document.querySelectorAll('#map-legend button').length") == 1
    assert chromium.problems == []


def test_narrow_screens_do_not_scroll_sideways(opened: Chromium) -> None:
    opened.view(360, 740)
    opened.ask(FRAME)
    assert opened.ask("document.documentElement.scrollWidth") <= 360
    opened.view(1200, 900)


def test_the_page_of_a_sweep_is_quiet(chromium: Chromium, tmp_path: Path) -> None:
    """With settings of every kind, texts that are markup, and a trial that failed."""
    rows: list[dict[str, Any]] = [
        {"trial": i, "separation": 0.9 - i / 10, "steps": 50 * (i + 1), "error": NASTY[i],
         "train.learning_rate": 10.0**-i, "model.pooling": NASTY[i], "model.bidirectional": bool(i % 2)}
        for i in range(3)
    ]  # fmt: skip
    rows.append({**rows[0], "trial": 3, "separation": None})
    curve = [{"trial": i, "step": step, "separation": 0.5} for i in range(3) for step in (50, 100)]
    (tmp_path / "sweep.html").write_text(sweep_page(rows, curve), "utf-8")
    chromium.open(tmp_path / "sweep.html")
    assert chromium.ask("document.querySelectorAll('.canvas .main-svg').length") >= 2
    ticks = chromium.ask("[...document.querySelectorAll('#plot-settings .xtick')].map((e) => e.textContent)")
    assert ticks == ["learning_rate", "pooling", "bidirectional", "steps", "separation"]
    assert NASTY[0] in chromium.ask("document.querySelector('table').textContent")
    assert "1 trial came to no result" in chromium.ask("document.body.textContent")
    assert chromium.problems == [] and len(chromium.requests) == 1


def test_a_page_of_nothing_is_quiet(chromium: Chromium, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render(nothing()), "utf-8")
    chromium.open(tmp_path / "report.html")
    assert chromium.ask("document.documentElement.dataset.ready") == "true"
    assert chromium.problems == []


# ---------------------------------------------------------------------------------------------
# Who the sources are
# ---------------------------------------------------------------------------------------------


def with_scanners(name: str) -> ReportData:
    """The example with every source of the largest cluster on a list from 30 days before."""
    sequences, clusters = telescope(0)
    day = (datetime.fromtimestamp(START_US / 1e6, UTC) - timedelta(30)).date()
    members = clusters.filter(pa.array(clusters["cluster"].to_numpy() == 0))["sequence_id"]
    entries = [
        {"network": src, "length": 32, "organisation": name, "kind": "scanner", "source": NASTY[1],
         "valid_from": day, "valid_to": day}
        for src in sequences["src"].take(members).unique().to_pylist()
    ]  # fmt: skip
    known = Scanners(pa.Table.from_pylist(entries, schema.SCANNERS), 90)
    fields = {"list": "x", "source": NASTY[1], "networks": 60, "organisations": 1, "valid_from": day}
    joined = clusters.drop_columns(["src"]).append_column("src", sequences["src"])
    return example(
        campaigns=campaigns(summarise(sequences, clusters, "2024-03", known)),
        lists=pa.Table.from_pylist([{**fields, "valid_to": day}]),
        tolerance_days=90,
        origins={"Countries": origins(joined, "2024-03", lambda src: pa.array([NASTY[2]] * len(src)))},
    )


def test_known_scanners_are_named_with_their_dates() -> None:
    page = Page(render(with_scanners("censys")))
    text = " ".join(page.text.split())
    assert page.data["flags"]["scanners"]
    assert "up to 90 days outside the dates" in text
    assert re.search(r"the farthest used here is \d\d days off", text)
    assert page.data["table"]["scanners"][:2] == [[["censys", 60]], []]
    assert page.data["table"]["known"][:2] == [60, 0]
    assert page.details["origins"][0] == [["Countries", [[NASTY[2], 60]]]]
    nasty = Page(render(with_scanners(NASTY[0])))
    assert {tag for tag, _ in nasty.tags} == {tag for tag, _ in page.tags}
    assert NASTY[1] in nasty.text and nasty.data["table"]["scanners"][0][0][0] == NASTY[0]


def test_what_was_not_asked_is_said() -> None:
    assert "No list of known scanners was given." in Page(render(example())).text
    hidden = Page(render(example(lists=None))).text
    assert "Addresses are pseudonyms (Crypto-PAn)" in hidden
    assert "No list of known scanners" not in hidden
    by_lists = Page(render(example(evaluation={**evaluation(), "labels_from": "scanner lists"}))).text
    assert "organisations that lists of known scanners name" in by_lists


@pytest.mark.parametrize(
    ("tool", "first", "last", "said"),
    [
        ("zmap", 2013, 2023, ""),
        ("zmap", 2013, 2025, "builds since March 2024"),
        ("masscan", 2013, 2014, "one packet in 65,536"),
        ("mirai", 2013, 2014, "before August 2016"),
        ("mirai", 2017, 2018, ""),
    ],
)
def test_marks_of_tools_are_held_against_the_years(tool: str, first: int, last: int, said: str) -> None:
    text = words.caution(tool, *(datetime(year, 1, 1, tzinfo=UTC) for year in (first, last)))
    assert (said in text) if said else text == ""
    assert words.caution("zmap", None, None) == ""
