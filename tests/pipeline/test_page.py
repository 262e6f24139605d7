"""results/report.html in a real browser: asks for nothing, runs nothing that a model wrote, finds every answer."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.harness.jsonl import read_rows
from stages.host.report import write_reports
from stages.scoring.answers import parse_number
from tests.finished_run import MODELS, NASTY, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="there is no chromium on PATH to open the page with: apt-get install chromium"
)
SHOWN = "ol#list > li:not([hidden])"

# Every text on screen against what is painted behind it, by WCAG 2.1's contrast; 4.5 is the least for small text.
LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgba(colour).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const low = new Set();
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest("script, style, noscript, :disabled, optgroup")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.add(`${node.tagName} ${node.className.baseVal ?? node.className}`);
  }
  return [...low];
}"""


# The focused element draws an outline; a radio button, itself unseen, has its label do so.
FOCUS_SEEN = """() => {
  const at = document.activeElement, seen = at.matches("#show input") ? at.nextElementSibling : at;
  return at === document.body || getComputedStyle(seen).outlineStyle !== "none";
}"""
WITHIN_LIST = """(button) => {
  const list = document.getElementById("list").getBoundingClientRect(), row = button.getBoundingClientRect();
  return row.top >= list.top - 1 && row.bottom <= list.bottom + 1;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = write_run(tmp_path_factory.mktemp("run"), problems=150, words=40, gguf_problems=30)
    write_reports(made)
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture
def opened(folder, browser) -> Iterator[Callable]:
    """Opens the page, and afterwards asserts that it logged nothing, asked for nothing and opened no dialog."""
    said, asked, contexts = [], set(), []

    def open_page(hash: str = "", *, file: Path = folder / "results/report.html", width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.on("request", lambda request: asked.add(request.url.partition("#")[0]))
        page.goto(file.as_uri() + hash)
        asked.discard(file.as_uri())
        if options.get("java_script_enabled", True) and page.locator("#packed, #browser").count():
            page.locator("#browser").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and asked == set()


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, dict[str, dict]]:
    """Each model's predictions by id, in the order of the test."""
    found = {model: list(read_rows(folder / f"results/predictions/{model}.jsonl")) for model in MODELS}
    return {model: {row["id"]: row for row in its_rows} for model, its_rows in found.items()}


@pytest.fixture(scope="module")
def gold(folder) -> dict[str, dict]:
    return {row["id"]: row for row in read_rows(folder / "data/mix/test.jsonl")}


FITS = {
    "all": lambda row: True,
    "right": lambda row: row["correct"],
    "wrong": lambda row: not row["correct"],
    "unparsed": lambda row: row["answer"] is None or parse_number(row["answer"]) is None,
    "truncated": lambda row: row["finish_reason"] == "length",
}


def listed(page) -> list[int]:
    """The problems in the list, as numbers from 0."""
    return [int(text) - 1 for text in page.locator(f"{SHOWN} .number").all_text_contents()]


def current(page) -> int:
    return int(page.locator("#list li:has([aria-current])").get_attribute("data-place"))


def test_the_page_opens_quietly_with_every_problem_listed(opened, rows):
    page = opened()
    assert listed(page) == list(range(len(rows["base"])))
    assert page.locator("#count").inner_text() == "150 of 150 problems."
    assert page.url.endswith("report.html"), "nothing was chosen, so the address says nothing"


@pytest.mark.parametrize("model", MODELS)
def test_each_filter_lists_the_problems_that_the_predictions_say(opened, rows, model):
    page = opened()
    page.select_option("#model-a", model)
    for show, fits in FITS.items():
        expected = [place for place, row in enumerate(rows[model].values()) if fits(row)]
        page.locator(f"#show input[value={show}]").check(force=True)
        assert listed(page) == expected
        assert page.locator(f"#show input[value={show}] + span b").inner_text() == str(len(expected))
    assert 0 < len(expected) < 150, "the run has answers that were cut off"


def test_only_disagreements_between_two_models_are_listed(opened, rows):
    page = opened()
    assert page.locator("#differ").is_disabled(), "with one model there is nothing to disagree with"
    page.select_option("#model-a", "grpo")
    page.select_option("#model-b", "sft")
    page.locator("#differ").check()
    pairs = list(zip(rows["grpo"].values(), rows["sft"].values(), strict=True))
    expected = [place for place, (a, b) in enumerate(pairs) if a["correct"] != b["correct"]]
    assert listed(page) == expected and 0 < len(expected) < 150
    page.locator("#show input[value=right]").check(force=True)
    assert listed(page) == [place for place in expected if pairs[place][0]["correct"]]


def test_steps_and_text_narrow_the_list(opened, rows, gold):
    page = opened()
    page.select_option("#step-count", "2")
    two_steps = [place for place, row in enumerate(gold.values()) if row["steps"] == 2]
    assert listed(page) == two_steps
    answers = rows["base"]
    texts = [f"{row['question']}\n{answers[id]['completion']}".lower() for id, row in gold.items()]
    wanted = texts[two_steps[3]].split()[-4]
    page.fill("#query", wanted.upper())
    expected = [place for place in two_steps if wanted in texts[place]]
    assert two_steps[3] in expected and listed(page) == expected
    page.fill("#query", "no text has this")
    assert listed(page) == [] and "No problem fits." in page.locator("#detail").inner_text()


def test_a_gguf_form_lists_only_what_it_was_asked(opened):
    page = opened()
    page.select_option("#model-a", "qlora q4_k_m")
    assert listed(page) == list(range(30))
    page.select_option("#model-a", "qlora")
    page.select_option("#model-b", "qlora q4_k_m")
    page.locator(SHOWN).nth(100).click()
    assert "not asked" in page.locator(".card[data-model='qlora q4_k_m']").inner_text()


def test_a_problem_shows_question_gold_and_both_answers_with_their_verdicts(opened, rows, gold):
    page = opened("#a=qlora&b=grpo")
    page.locator(SHOWN).nth(7).click()
    id = list(gold)[7]
    assert page.locator("#detail .question").text_content() == gold[id]["question"]
    assert page.locator(".card.gold pre").text_content() == re.sub("<<.*?>>", "", gold[id]["answer"])
    for model in ("qlora", "grpo"):
        card, row = page.locator(f".card[data-model={model}]"), rows[model][id]
        assert card.locator("pre").text_content() == row["completion"]
        verdict = card.locator(".verdict").inner_text()
        assert ("right" in verdict) == row["correct"] and f"{row['tokens']} tokens" in card.inner_text()
        assert f"last number {'right' if row['correct_flexible'] else 'wrong'}" in card.inner_text()


def test_what_a_model_wrote_is_shown_and_does_nothing(opened, rows):
    page = opened("#a=sft&b=orpo")
    shown = page.locator(".card[data-model=sft] pre").text_content()
    assert shown == rows["sft"]["test-000000"]["completion"] and NASTY in shown
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    page.fill("#query", "<img src=x")
    assert listed(page) == [0]


def test_the_list_is_walked_by_keys(opened):
    page = opened("#a=qlora")
    page.locator(f"{SHOWN} button").first.focus()
    for key, place in (("j", 1), ("ArrowDown", 2), ("k", 1), ("ArrowUp", 0), ("ArrowUp", 0), ("End", 149), ("Home", 0)):
        page.keyboard.press(key)
        assert current(page) == place, key
        assert page.evaluate("document.activeElement.parentElement.dataset.place") == str(place)
        assert f"Problem {place + 1}" in page.locator("#detail h3").inner_text()
    page.keyboard.press("End")
    assert page.locator("#list [aria-current]").evaluate(WITHIN_LIST), "the list scrolls with what is chosen"


def test_slash_goes_to_the_text_and_escape_back(opened):
    page = opened()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("a/b")
    assert page.locator("#query").input_value() == "a/b", "a slash in the text is a slash"
    page.fill("#query", "")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.parentElement.dataset.place") == "0"


def test_previous_and_next_walk_the_filtered_list_and_keep_the_focus(opened, rows):
    page = opened("#a=base&show=wrong")
    wrong = listed(page)
    page.get_by_role("button", name="Next").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert current(page) == wrong[2]
    page.get_by_role("button", name="Previous").click()
    assert current(page) == wrong[1]


def test_a_chip_sets_its_model_beside(opened):
    page = opened("#a=qlora")
    page.get_by_role("button", name=re.compile("^orpo: .*; show it beside")).click()
    assert page.locator("#model-b").input_value() == "orpo" and page.locator(".card[data-model=orpo]").count() == 1
    assert page.evaluate("document.activeElement.dataset.model") == "orpo"


def test_the_address_brings_the_choice_back(opened, rows):
    page = opened()
    page.select_option("#model-a", "grpo")
    page.select_option("#model-b", "base")
    page.locator("#differ").check()
    page.select_option("#step-count", "3")
    page.locator(SHOWN).nth(2).click()
    chosen, hash = current(page), "#" + page.url.partition("#")[2]
    again = opened(hash)
    assert listed(again) == listed(page) and current(again) == chosen
    assert again.locator("#model-a").input_value() == "grpo" and again.locator("#differ").is_checked()
    assert again.locator("#answers h2").is_visible()
    again.evaluate("location.hash = 'a=sft&show=right'")
    expected = [place for place, row in enumerate(rows["sft"].values()) if row["correct"]]
    again.locator("#show input[value=right]:checked").wait_for(state="attached")
    assert listed(again) == expected


@pytest.mark.parametrize("hash", ["#a=nobody&show=nothing&id=x&steps=99&differ=2", "#results", "#=&&==", "#a=%ff"])
def test_an_address_of_nonsense_chooses_nothing(opened, hash):
    page = opened(hash)
    assert len(listed(page)) == 150 and page.locator("#model-a").input_value() == "base"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("hash", ["", "#a=qlora&b=orpo"])
def test_every_text_stands_out_from_its_ground(opened, scheme, hash):
    page = opened(hash, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((folded) => { folded.open = true })")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert brightness > 240 if scheme == "light" else brightness < 40
    assert page.evaluate(LOW_CONTRAST) == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    page = opened("#a=qlora&b=orpo", width=width)
    page.evaluate("document.querySelectorAll('details').forEach((folded) => { folded.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_every_control_and_chart_has_a_name(opened):
    page = opened("#a=qlora&b=orpo")
    nameless = "[...document.querySelectorAll('select, input')].filter((field) => !field.labels.length).length"
    assert page.evaluate(nameless) == 0
    assert all(page.locator("button").evaluate_all("all => all.map((one) => one.ariaLabel || one.innerText.trim())"))
    named = page.locator("svg:not([aria-hidden])").evaluate_all(
        "all => all.map((one) => one.getAttribute('aria-label'))"
    )
    assert len(named) > 10 and all(named)


def test_the_focus_is_seen(opened):
    page = opened()
    for _ in range(40):
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUS_SEEN), page.evaluate("document.activeElement.outerHTML.slice(0, 200)")


def test_without_javascript_all_but_the_answers_is_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("#scores tbody tr").count() == 10 and page.locator(".forest .mark").count() == 13
    assert page.locator("noscript p").is_visible()


def test_without_predictions_the_page_works(opened, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/results/predictions")
    page = opened(file=write_reports(tmp_path / "copy")[1])
    assert "dvc pull" in page.locator("#missing").inner_text() and page.locator("#browser").count() == 0
