"""The page: one file that asks for nothing, whose numbers are those of the tables, and that a browser runs unharmed."""

import csv
import json
import os
import re
import shutil
import time

import numpy as np
import pytest

from docs import make_page
from tests.helpers import ROOT, rows
from utils.directions import canonical_frequency, frequency_grid

PAGE = ROOT / "docs" / "index.html"
CELLS = [(y, x) for y in frequency_grid(32) for x in frequency_grid(32)]
DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make(folder, *options):
    make_page.main(["--output", str(folder / "index.html"), *map(str, options)])
    return (folder / "index.html").read_text(encoding="utf-8")


def content(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("page"))


def test_the_committed_page_is_what_the_command_makes(made):
    assert PAGE.read_text(encoding="utf-8") == made, "make it anew: python docs/make_page.py"


def test_the_page_is_one_file_that_loads_nothing(made):
    assert len(made.encode()) < 3e6
    outside = re.findall(
        r'(?:src|href|action|data)=["\'](?!data:|#)([^"\']*)|url\(|@import|fetch\(|XMLHttp|WebSocket', made
    )
    links = re.findall(r'<a href="(https?:[^"]*)"', made)
    assert set(outside) == set(links) and len(re.findall("https?:", made.split('id="data"')[0])) == len(links)
    assert "default-src 'none'" in made
    ids = set(re.findall(r' id="([^"]+)"', made))
    assert (
        set(re.findall(r'href="#([^"]+)"', made)) <= ids
        and set(re.findall(r'(?:for|labelledby)="([^"]+)"', made)) <= ids
    )


def accuracies(file, network=None):
    table = [row for row in rows(ROOT / "results" / file) if row.get("network", network) == network]
    return {(int(row["frequency_y"]), int(row["frequency_x"])): row["test_accuracy"] for row in table}


def test_the_maps_are_those_of_the_tables_as_they_stand_there(made):
    entries = content(made)["entries"]
    seen = set()
    for name, entry in entries.items():
        for one in entry.get("measured", []):
            table = accuracies(one["file"], name if "designs" in one["file"] else None)
            mirrored = (
                {canonical_frequency(y, -x): text for (y, x), text in table.items()} if "designs" in one["file"] else {}
            )
            table = {canonical_frequency(*cell): text for cell, text in (mirrored | table).items()}
            assert one["values"].split() == [table.get(canonical_frequency(*cell), "-") for cell in CELLS]
            seen.add(one["file"])
    files = {path.name for path in (ROOT / "results").glob("directional_bias_*.csv") if "published" not in path.name}
    assert files | {"designs/accuracies.csv"} == seen
    for row in rows(ROOT / "results" / "prediction" / "maps.csv"):
        entry = entries[row["network"]]
        cell = canonical_frequency(int(row["frequency_y"]), int(row["frequency_x"]))
        if entry["file"] == "prediction/maps.csv":
            assert entry["shares"].split()[CELLS.index(cell)] == row["share"]


def test_the_atlas_is_shown_where_there_is_one_and_left_out_where_not(tmp_path):
    empty = content(make(tmp_path, "--results", tmp_path))
    assert empty["entries"] == {} and empty["tree"] is None and empty["nads"]["LeNet"]["curves"] == []
    (tmp_path / "atlas").mkdir()
    header = ["architecture", "family", "seconds", "roughness", "why_not"]
    table = [["lenet", "paper", "1", "0.677", ""], ["torchvision:large", "large", "", "", "too <large>"]]
    table += [["torchvision:b", "b", "1", "0.5", ""]]
    with open(tmp_path / "atlas" / "atlas.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    maps = np.random.default_rng(0).uniform(0.1, 10, (2, 16, 16)).astype(np.float32)
    cells = [CELLS.index(canonical_frequency(*cell)) for cell in CELLS]
    maps = maps.reshape(2, -1)[:, cells].reshape(maps.shape)  # the same in k and −k, as the atlas writes them
    np.save(tmp_path / "atlas" / "maps.npy", maps)
    found = content(make(tmp_path, "--results", tmp_path))
    assert list(found["entries"]) == ["LeNet", "b"] and found["skipped"] == {"large": "too <large>"}
    np.testing.assert_allclose(np.array(found["entries"]["b"]["shares"].split(), float), maps[1].ravel(), rtol=5e-4)
    assert found["entries"]["LeNet"]["facts"] == {"family": "paper", "roughness": "0.677"}
    rms = np.sqrt(np.mean(np.log2(maps[0] / maps[1]) ** 2))
    assert found["entries"]["LeNet"]["near"] == [["b", f"{2**rms:.2f}"]]
    assert sorted(found["tree"]["names"]) == ["LeNet", "b"]


def test_nads_and_curves_are_those_of_the_files(made):
    nads = content(made)["nads"]
    assert list(nads) == sorted(path.name.split("_")[0] for path in (ROOT / "NADs").glob("*_NADs.npy"))
    for name, one in nads.items():
        singular = np.load(ROOT / "NADs" / f"{name}_eigenvals.npy")
        np.testing.assert_allclose(np.array(one["singular"].split(), float), singular, rtol=5e-4)
    lenet = nads["LeNet"]
    bytes_ = np.frombuffer(make_page.base64.b64decode(lenet["rows"]), np.int8).reshape(-1, 1024)
    true = np.load(ROOT / "NADs" / "LeNet_NADs.npy")[lenet["indices"]]
    assert np.abs(bytes_ / 127 - true / np.abs(true).max(1, keepdims=True)).max() < 0.5 / 127 + 1e-6
    for curve in lenet["curves"]:
        expected = [[int(row["nad_index"]), row["test_accuracy"]] for row in rows(ROOT / "results" / curve["file"])]
        assert curve["points"] == expected and {index for index, _ in expected} <= set(lenet["indices"])
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in lenet["poison"]] == rows(
        ROOT / "results" / "poison_lenet.csv"
    )
    assert lenet["ends"]["flip"][0]["test_accuracy"] == rows(ROOT / "results" / "flip_lenet.csv")[0]["test_accuracy"]


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium")
    if not (DRIVER and CHROMIUM):
        pytest.skip("the browser test needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "the page did not come to this"
        time.sleep(0.05)


def resize(driver, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_a_browser_moves_types_clicks_and_finds_no_error(browser, made, tmp_path):
    """SCREENSHOT=docs/page.png python -m pytest tests/test_page.py -k browser  also makes the README's picture."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    find = lambda selector: browser.find_element(By.CSS_SELECTOR, selector)  # noqa: E731
    address = lambda: dict(re.findall(r"(\w+)=([^&]*)", browser.current_url.partition("#")[2]))  # noqa: E731
    cell = lambda y, x: find(f'#panel-a .map td[data-k="{y},{x}"]')  # noqa: E731
    url = (tmp_path / "index.html").as_uri()
    (tmp_path / "index.html").write_text(made, encoding="utf-8")
    entries = content(made)["entries"]
    resize(browser, 1400)
    browser.get(url)
    assert find("#h-a").text == "LeNet" and len(browser.find_elements(By.CSS_SELECTOR, ".tile")) == len(entries)

    ActionChains(browser).move_to_element(cell(4, -6)).perform()
    assert find("#h-cell").text == "Frequency 4 up, −6 across"
    shown = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#cell-numbers tr:nth-child(2) button")]
    at = CELLS.index((4, -6))
    lenet = [entries["LeNet"]["shares"].split()[at], entries["LeNet"]["measured"][0]["values"].split()[at] + " %"]
    assert shown == lenet
    ActionChains(browser).move_to_element(find("h1")).perform()
    assert find("#h-cell").text == "Frequency −2 up, −2 across"  # moving away, the cell that was kept
    cell(4, -6).click()
    wait_for(lambda: address().get("k") == "4,-6")

    find("#search-a").send_keys(Keys.TAB, Keys.NULL)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "vertical 4, horizontal −4: share" in browser.switch_to.active_element.get_attribute("aria-label")
    wait_for(lambda: address().get("k") == "4,-4")

    find("#search-a").send_keys("no such", Keys.ENTER)
    assert "no such" in find("#said-a").text
    find("#search-a").clear()
    find("#search-a").send_keys("ResNet18", Keys.ENTER)
    assert find("#h-a").text == "ResNet18"
    find('[name=side][value="b"]').click()
    find('.tile[data-name="VGG11"]').click()
    assert find("#h-b").text == "VGG11" and browser.switch_to.active_element == find("#h-b")
    wait_for(lambda: (address()["a"], address()["b"]) == ("resnet18", "vgg11"))

    find("#sigma").send_keys(Keys.HOME)
    assert find("#sigma-value").text == "σ = 0"
    find("#nad").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert find("#nad-value").text == "2"
    wait_for(lambda: (address()["s"], address()["i"]) == ("0", "2"))
    find("#nad-numbers button").click()
    assert "NADs_scripts/lenet_nad.py" in browser.switch_to.active_element.text
    find("#back").click()
    assert browser.switch_to.active_element == find("#nad-numbers button")

    kept = browser.current_url
    browser.get("about:blank")
    browser.get(kept)
    assert (find("#h-a").text, find("#h-b").text, find("#sigma-value").text) == ("ResNet18", "VGG11", "σ = 0")
    resize(browser, 400)
    wait_for(lambda: browser.execute_script("return document.documentElement.scrollWidth") <= 400)
    assert browser.get_log("browser") == []

    if os.environ.get("SCREENSHOT"):
        resize(browser, 1400)
        browser.get("about:blank")
        browser.get(f"{url}#a=lenet&b=resnet18&k=-2,-2&s=0.03")
        browser.execute_script("scrollTo(0, document.querySelector('#explore').offsetTop - 4)")
        browser.save_screenshot(os.environ["SCREENSHOT"])
