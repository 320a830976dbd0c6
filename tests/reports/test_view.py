"""`mmedit report view`: one page that holds everything, and in which the text of a case stays text."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html import unescape

import pytest
from browser import CHROMIUM, Browser
from conftest import SHAPES, page_data
from PIL import Image

from mmedit_cli.app import main
from mmedit_cli.page.charts import Score, intervals, over_edits
from mmedit_cli.page.writing import Answers, Card, Page, Question, write_page
from mmedit_cli.reports import thumbnails

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><script>"
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine"
)


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    """The page of a small run, one of whose cases asks for markup."""
    folder = tmp_path_factory.mktemp("viewed")
    data = shutil.copytree(SHAPES, folder / "data")
    file = data / "cases.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["request"]["prompt"] = EVIL
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = f"eval ft --model tiny-blip2 --data {data} --records {folder} --limit 4 "
    words += "--sequential 4 --report-at 1,4 --set steps=5 --max-new-tokens 2"
    assert main(words.split()) == 0
    page = folder / "page.html"
    words = f"report view latest --records {folder} --out {page}"
    assert main(words.split()) == 0
    return page


@pytest.fixture(scope="module")
def run(viewed):
    """The folder of that run."""
    (report,) = viewed.parent.rglob("report.json")
    return report.parent


def test_the_page_has_every_case_with_its_picture_and_answers(viewed, run):
    data = page_data(viewed)
    lines = (run / "cases.jsonl").read_text().splitlines()
    recorded = [json.loads(line) for line in lines]
    last = {line["case"]: line for line in recorded if line["edits"] == 4}
    assert len(data["cards"]) == len(last) == 4
    for card, line in zip(data["cards"], last.values(), strict=True):
        said = [answer for answers in line["answers"].values() for answer in answers]
        assert [q["target"] for q in card["questions"]] == [a["target"] for a in said]
        assert [q["before"] for q in card["questions"]] == [a["before"] for a in said]
        assert card["answers"][-1]["after"] == [answer["after"] for answer in said]
        right = card["answers"][-1]["right"][0]
        assert right == (line["scores"]["ar"]["reliability"] == 1)
        address = data["pictures"][card["questions"][0]["picture"]]
        drawn = base64.b64decode(address.partition(",")[2])
        assert Image.open(io.BytesIO(drawn)).format == "WEBP"
    assert [len(card["answers"]) for card in data["cards"]] == [2, 1, 1, 1]
    assert "locality" not in " ".join(data["probes"])
    assert set(data["kept"]) < set(data["probes"])


def test_the_page_shows_what_the_terminal_shows(viewed, run, cli):
    text = unescape(viewed.read_text())
    table = cli("report", run)[1]
    for figure in re.findall(r"\d+\.\d ±\d+\.\d", table):
        assert figure in text
    assert "steps: 5" in text, "the run's own configuration"
    assert text.count("<svg") == 2


def test_nothing_is_fetched_and_no_text_becomes_markup(viewed):
    text = viewed.read_text()
    assert page_data(viewed)["cards"][1]["questions"][0]["prompt"] == EVIL
    assert EVIL not in text
    assert text.count("</script") == 2
    assert "<img" not in text
    assert not re.findall(r"https?://", text)
    assert "default-src &#x27;none&#x27;" in text


def test_a_run_without_recorded_questions_still_has_its_answers(run, cli, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    (old / "questions.jsonl").unlink()
    code, out, _ = cli("report", "view", old)
    assert (code, out.strip()) == (0, str(old / "page.html"))
    card = page_data(old / "page.html")["cards"][0]
    assert "not recorded" in card["title"]
    assert card["questions"][0]["target"] == "blue triangle"
    assert card["questions"][0]["picture"] == -1


def test_several_runs_share_a_page(run, cli, tmp_path):
    page = tmp_path / "two.html"
    assert cli("report", "view", run, run, "--out", page)[0] == 0
    data = page_data(page)
    assert len(data["runs"]) == 2
    assert [card["run"] for card in data["cards"]] == [0] * 4 + [1] * 4
    assert len(data["pictures"]) == len(set(data["pictures"]))


def test_bad_places_are_refused(cli, tmp_path):
    assert cli("report", "view", "latest")[0] == 2
    (tmp_path / "empty").mkdir()
    for words in ((tmp_path / "empty",), (tmp_path, "--out", tmp_path / "page.txt")):
        code, _, err = cli("report", "view", *words)
        assert code == 2, err
        assert not list(tmp_path.glob("page*"))


def test_pictures_get_smaller_until_they_fit(monkeypatch, tmp_path):
    files = []
    for number in range(8):
        files.append(tmp_path / f"{number}.png")
        noise = Image.effect_noise((128, 128), 80 + number)
        noise.save(files[-1])
    large = thumbnails.thumbnails(files)
    monkeypatch.setattr(thumbnails, "_BUDGET", sum(map(len, large.values())) // 4)
    small = thumbnails.thumbnails([*files, tmp_path / "gone.png"])
    assert list(small) == files
    assert sum(map(len, small.values())) < sum(map(len, large.values())) / 4


def test_charts_place_scores_where_they_belong():
    half, all_right = Score(0.5, (0.25, 0.75)), Score(1.0)
    chart = intervals(
        "t", ["a", "b"], [("one", [half, None]), ("two", [all_right] * 2)]
    )
    assert re.findall(r'cx="([\d.]+)"', chart) == ["320.0", "470.0", "470.0"]
    assert 'x1="245.0" y1="38.5" x2="395.0"' in chart
    line = over_edits("<t>", [1, 10], [("one", [all_right, half])])
    assert 'points="170.0,30.0 470.0,130.0"' in line
    assert "<t>" not in line


@pytest.mark.browser
@needs_chromium
def test_in_a_browser(viewed):
    address = viewed.as_uri()
    with Browser(address) as browser:
        assert browser.do("document.title") == "ft on tiny-blip2, data"
        assert browser.do("document.querySelectorAll('.card').length") == 4
        heading = browser.do("document.querySelector('#case-2 h3').textContent")
        assert heading.startswith(EVIL)
        assert browser.do("document.querySelector('.body img').naturalWidth") > 0
        browser.press("j")
        browser.press("j")
        assert browser.do("document.activeElement.id") == "case-2"
        browser.press("k")
        assert browser.do("document.activeElement.id") == "case-1"
        browser.press("w")
        marks = "[...document.querySelectorAll('.mark')].map((m) => m.textContent[0])"
        assert set(browser.do(marks)) == {"✗"}
        browser.press("w")
        browser.press("/")
        assert browser.do("document.activeElement.type") == "search"
        browser.do("filters.text.value = 'onerror'; apply()")
        assert browser.do("count.textContent") == "1 of 4 cases"
        dark = browser.do("document.documentElement.dataset.theme")
        browser.do("document.getElementById('theme').click()")
        assert browser.do("document.documentElement.dataset.theme") != dark
        browser.open(f"{address}#case-4")
        assert browser.do("document.activeElement.id") == "case-4"


@pytest.mark.browser
@needs_chromium
def test_a_thousand_cases_are_there_at_once(tmp_path):
    asked = [Question("Rel", "What is this?", -1, "", "a thing", "none")] * 20
    said = [Answers(1, ["a thing"] * 20, [True] * 20, ["right"] * 20)]
    many = range(1247)
    cards = [Card(f"case {n}", questions=asked, answers=said) for n in many]
    page = tmp_path / "page.html"
    write_page(Page("many", cards=cards, probes=["Rel"]), page)
    with Browser(page.as_uri()) as browser:
        shown = browser.do("document.querySelectorAll('.card').length")
        assert 0 < shown < 100, "the others when they are scrolled to"
        browser.do("location.hash = '#case-1247'; follow()")
        assert browser.do("document.activeElement.id") == "case-1247"
