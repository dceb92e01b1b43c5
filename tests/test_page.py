"""The page: one file that asks for nothing, whose numbers are those of the tables, and that a browser runs unharmed."""

import base64
import json
import os
import re
import shutil

import numpy as np
import pytest

from docs import make_page
from tests.helpers import ROOT, rows, wait_until
from utils import plotting, tables
from utils.directions import canonical_frequency, frequency_grid

RESULTS, NADS = ROOT / "results", ROOT / "NADs"
CELLS = [canonical_frequency(y, x) for y in frequency_grid(32) for x in frequency_grid(32)]
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
    committed = (ROOT / "docs" / "index.html").read_text(encoding="utf-8")
    assert committed == made, "make it anew: python docs/make_page.py"


def test_the_page_is_one_file_that_loads_nothing(made):
    assert len(made.encode()) < 3e6 and "default-src 'none'" in made
    links = re.findall(r'<a href="(https?:[^"]*)"', made)
    assert re.findall(r'(?:src|href|action)=["\'](?!data:|#)([^"\']*)', made) == links
    assert len(re.findall("https?:|url\\(|@import|fetch\\(|XMLHttp|WebSocket|import\\(", made)) == len(links)
    ids = set(re.findall(r' id="([^"]+)"', made))
    assert set(re.findall(r'(?:href="#|for="|labelledby=")([^"]+)"', made)) <= ids


def test_the_maps_are_those_of_the_tables_as_they_stand_there(made):
    elsewhere = {"studies/atlas/atlas.csv", "studies/designs/accuracies.csv"}  # an array; means over mirror images
    seen = set()
    for name, entry in content(made)["entries"].items():
        for one in [entry, *entry.get("measured", [])]:
            if one["file"] not in elsewhere:
                map_, column = ("sensitivity", "sensitivity") if one is entry else ("values", "test_accuracy")
                table = [row for row in rows(RESULTS / one["file"]) if row.get("network", name) == name]
                expected = {(int(row["frequency_y"]), int(row["frequency_x"])): row[column] for row in table}
                if "designs" in one["file"]:  # one of each pair of mirror images
                    expected |= {canonical_frequency(y, -x): text for (y, x), text in expected.items()}
                assert one[map_].split() == [expected.get(cell, "-") for cell in CELLS]
            seen.add(one["file"])
    files = ["stability/maps", "designs/predictions", "designs/accuracies"]
    trained = ["LogReg", "LeNet", "VGG11-bf16", "ResNet18-bf16", "DenseNet121-bf16"]
    trained += ["LeNet-nopooling", "LeNet-sigma1", "LeNet-nopooling-sigma1"]
    assert seen >= {f"studies/{file}.csv" for file in files}
    assert seen >= {f"directional_bias/{name}-fourier/accuracies.csv" for name in trained}


def test_the_atlas_is_shown_where_there_is_one_and_what_is_missing_is_left_out(tmp_path):
    empty = content(make(tmp_path, "--results", tmp_path))
    assert empty["entries"] == {} and empty["tree"] is None and empty["nads"]["LeNet"]["curves"] == []
    (tmp_path / "studies" / "atlas").mkdir(parents=True)
    table = [("lenet", "0.677", ""), ("torchvision:large", "", "too <large>"), ("torchvision:b", "0.5", "")]
    columns = ("architecture", "roughness", "why_not")
    tables.write_rows(tmp_path / "studies/atlas/atlas.csv", [dict(zip(columns, row, strict=True)) for row in table])
    frequencies, y = list(dict.fromkeys(CELLS)), np.random.default_rng(0)
    maps = [dict(zip(frequencies, y.uniform(0.1, 10, len(frequencies)), strict=True)) for _ in range(2)]
    maps = np.array([[values[cell] for cell in CELLS] for values in maps], np.float32)
    np.save(tmp_path / "studies/atlas/maps.npy", maps.reshape(2, 16, 16))
    found = content(make(tmp_path, "--results", tmp_path))
    assert list(found["entries"]) == ["LeNet", "b"] and found["skipped"] == {"large": "too <large>"}
    assert found["entries"]["b"]["sensitivity"].split() == [f"{value:.4g}" for value in maps[1]]
    assert found["entries"]["b"]["facts"] == {"roughness": "0.5"} and len(found["tree"]["names"]) == 2
    rms = np.sqrt(np.mean(np.log2(maps[0] / maps[1]) ** 2))
    assert found["entries"]["LeNet"]["near"] == [["b", f"{2**rms:.2f}"]]


def test_nads_and_curves_are_those_of_the_files(made):
    nads = content(made)["nads"]
    assert [f"{name}_NADs.npy" for name in nads] == sorted(path.name for path in NADS.glob("*_NADs.npy"))
    for name, one in nads.items():
        values, true = np.load(NADS / f"{name}_eigenvals.npy"), np.load(NADS / f"{name}_NADs.npy")[one["indices"]]
        assert one["singular"].split() == [f"{value:.4g}" for value in values]
        assert (ROOT / one["command"].removeprefix("python ")).is_file()
        drawn = np.frombuffer(base64.b64decode(one["rows"]), np.int8).reshape(-1, 1024) / 127
        assert np.abs(drawn - true / np.abs(true).max(1, keepdims=True)).max() < 0.501 / 127
        for curve in one["curves"]:
            table = rows(RESULTS / curve["file"])
            assert curve["points"] == [[int(row["nad_index"]), row["test_accuracy"]] for row in table]
            assert {index for index, _ in curve["points"]} <= set(one["indices"])
    shown = [kinds for one in nads.values() for kinds in one["trained"].values()]
    shown = {one["file"]: one["rows"] for kinds in shown for one in kinds.values()}
    runs = {path.parent.name: path for path in RESULTS.glob("poison_cifar/*/accuracies.csv")}
    other = ("lr0.05", "lr0.02", "published_nads")  # neither the paper's recipe nor its epochs cut short
    files = {str(path.relative_to(RESULTS)) for name, path in runs.items() if not name.split("-")[1].startswith(other)}
    assert shown.keys() == files
    for file, means in shown.items():
        by_nad = {}
        for row in rows(RESULTS / file):
            by_nad.setdefault(int(row.get("nad_index", -1)), []).append(row)
        assert [one.get("nad_index", -1) for one in means] == sorted(by_nad)
        for one in means:
            own = by_nad[one.get("nad_index", -1)]
            clean = np.array([float(row["test_accuracy"]) for row in own])
            assert one["trainings"] == len(own) and one["clean"] == pytest.approx(clean.mean())
            assert one["spread"] == pytest.approx(clean.std(ddof=1) if own[1:] else 0)
            if "nad_index" in one:
                assert one["carrying"] == pytest.approx(np.mean([float(row["carrying_accuracy"]) for row in own]))
    along = {curve["file"] for one in nads.values() for curve in one["curves"]}
    assert along == {str(path.relative_to(RESULTS)) for path in RESULTS.glob("directional_bias/*-nads/accuracies.csv")}


def test_a_number_of_a_run_has_the_command_of_its_config(made):
    commands = dict(content(made)["commands"])
    for path in RESULTS.glob("*/*/config.json"):
        command = json.loads(path.read_text())["command"].split(" --frequency")[0]
        assert commands[f"`{path.parent.relative_to(RESULTS)}/accuracies.csv`"].startswith(f"`python {command}")


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


def resize(driver, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_a_browser_moves_types_clicks_and_finds_no_error(browser, made, tmp_path):
    """SCREENSHOT=page.png python -m pytest tests/test_page.py -k browser  also makes a picture."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.color import Color

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def focused():
        return browser.switch_to.active_element

    def address():
        return dict(re.findall(r"(\w+)=([^&]*)", browser.current_url.partition("#")[2]))

    def cell(y, x):
        return find(f'#panel-a .map td[data-k="{y},{x}"]')

    (tmp_path / "index.html").write_text(made, encoding="utf-8")
    url, entries = (tmp_path / "index.html").as_uri(), content(made)["entries"]
    resize(browser, 1400)
    browser.get(url)
    assert find("#h-a").text == "LeNet" and len(browser.find_elements(By.CSS_SELECTOR, ".tile")) == len(entries)

    # Move: the cell under the mouse, with its numbers and its colour; away from the map, the one that was kept.
    ActionChains(browser).move_to_element(cell(4, -6)).perform()
    assert find("#h-cell").text == "Frequency 4 up, −6 across"
    at, lenet = frequency_grid(32).index(4) * 16 + frequency_grid(32).index(-6), entries["LeNet"]
    sensitivity, accuracy = lenet["sensitivity"].split()[at], lenet["measured"][0]["values"].split()[at]
    shown = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#cell-numbers tr:nth-child(2) button")]
    assert shown == [sensitivity, f"{accuracy} %"]
    figure = plotting.map_figure({(4, -6): float(sensitivity)}, 32, "", scale="sensitivity")
    color = "".join(f"{round(255 * part):02x}" for part in figure.axes[0].images[0].to_rgba(float(sensitivity))[:3])
    assert Color.from_string(cell(4, -6).value_of_css_property("background-color")).hex == f"#{color}"
    ActionChains(browser).move_to_element(find("h1")).perform()
    assert find("#h-cell").text == "Frequency −2 up, −2 across"
    cell(4, -6).click()
    wait_until(lambda: address().get("k") == "4,-6", seconds=5)

    # The keyboard: into the map, to the next cell; an unknown and a known name.
    find("#search-a").send_keys(Keys.TAB, Keys.NULL)
    focused().send_keys(Keys.ARROW_RIGHT)
    assert "vertical 4, horizontal −4: relative sensitivity" in focused().get_attribute("aria-label")
    wait_until(lambda: address().get("k") == "4,-4", seconds=5)
    find("#search-a").send_keys("no such", Keys.ENTER)
    assert "no such" in find("#said-a").text
    find("#search-a").clear()
    find("#search-a").send_keys("ResNet18", Keys.ENTER)
    assert find("#h-a").text == "ResNet18" and focused() == find("#search-a")

    # The sheet, the sliders, the way from a number to its command and back.
    find('[name=side][value="b"]').click()
    find('.tile[data-name="VGG11"]').click()
    assert find("#h-b").text == "VGG11" and focused() == find("#h-b")
    find("#sigma").send_keys(Keys.HOME)
    find("#nad").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert (find("#sigma-value").text, find("#nad-value").text) == ("σ = 0", "2")
    wait_until(lambda: [address().get(key) for key in "absi"] == ["resnet18", "vgg11", "0", "2"], seconds=5)
    find("#nad-numbers button").click()
    assert "NADs_scripts/lenet_nad.py" in focused().text
    find("#back").click()
    assert focused() == find("#nad-numbers button")

    # The address alone brings all of it back, also encoded; what it has that is unknown is named.
    kept, view = browser.current_url, ["ResNet18", "VGG11", "σ = 0"]
    encoded = kept.replace("=", "%3D").replace("&", "&amp;")
    for asked, unknown in [(kept, ""), (encoded, ""), (f"{kept}&k=9,9&x", "k=9,9, x="), (f"{url}#where", "where")]:
        browser.get("about:blank")
        browser.get(asked)
        if "=" in asked:
            assert [find(f"#{id_}").text for id_ in ("h-a", "h-b", "sigma-value")] == view
        assert find("#said-address").text.endswith(unknown) and find("#said-address").is_displayed() == bool(unknown)

    # Colours that are data stay, on paper and in a palette of the system; nothing is wider than a small phone.
    style = "const style = getComputedStyle(arguments[0]); return [style.backgroundColor, style.printColorAdjust]"
    color = browser.execute_script(style, cell(4, -6))[0]
    for media in ({"media": "print"}, {"features": [{"name": "forced-colors", "value": "active"}]}):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert browser.execute_script(style, cell(4, -6)) == [color, "exact"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {})
    resize(browser, 360)
    wait_until(lambda: browser.execute_script("return document.documentElement.scrollWidth") <= 360, seconds=5)
    if os.environ.get("SCREENSHOT"):
        resize(browser, 1400)
        browser.get("about:blank")
        browser.get(f"{url}#a=lenet&b=resnet18&k=-2,-2&s=0.03")
        browser.execute_script("scrollTo(0, document.querySelector('#explore').offsetTop - 4)")
        browser.save_screenshot(os.environ["SCREENSHOT"])
    assert browser.get_log("browser") == []
