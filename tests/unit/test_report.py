"""The evaluation report: every plot with its data, no network needed, no complaint of a browser."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from components.digests import tables_digest
from components.evaluate import steps
from components.evaluate.report import COLOURS, NAMES
from components.train import steps as train
from model.store import Lineage, ModelStore
from tests import synthetic

TRAIN = {"max_epochs": 2, "network": {"embedding": 4, "hidden": 4, "control": 2}}
MODELS = set(COLOURS)
# Each plot, and what it must have drawn: whose curve, bars or points.
PLOTS = {
    "Learning curve": {"hrnn"},
    "Over time": MODELS,
    "By length of history": MODELS,
    "Cold start": MODELS,
    "By popularity of the item that was chosen": MODELS,
    "By time since the last event": MODELS,
    "Popularity of what is recommended": MODELS,
    "Coverage": MODELS,
    "Calibration of perplexity": {"hrnn"},
    "Calibration of the first item": {"hrnn"},
    "Effect of the request's time": {"hrnn"},
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The page and the figures of a candidate beside a champion of half the log."""
    folder = tmp_path_factory.mktemp("report")
    log = synthetic.successor(80, 8, 10, seed=0)
    synthetic.clean_tables(folder / "before", log.subset(np.arange(60)))
    synthetic.clean_tables(folder / "clean", log)
    for bundle, data in (("old", "before"), ("new", "clean")):
        train.run(folder / data, folder / bundle, trend={}, settings=TRAIN)
    store = ModelStore(str(folder / "store"))
    lineage = Lineage(data_digest=tables_digest(folder / "before"))
    store.promote(store.publish(folder / "old", lineage))
    document = steps.run(
        folder / "clean",
        folder / "new",
        folder / "evaluation",
        folder / "report",
        settings={"samples": 50, "frames": 3},
        model_store=store.uri,
    )
    page = folder / "report.html"
    shutil.copyfile(folder / "report", page)
    return page, document


class _Page(HTMLParser):
    """What a person sees: text by table, titles of figures; and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.addresses, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "data")
        ]

    def handle_data(self, data):
        if data.strip():
            self.cells.append(data.strip())


def _figures(text):
    """Root of the SVG by title."""
    found = re.findall(
        r"<figure><strong>(.*?)</strong>(<svg.*?</svg>)\s*<figcaption>(.+?)</f", text, re.S
    )
    return {
        title.replace("&#39;", "'"): ElementTree.fromstring(svg)  # noqa: S314 - our own
        for title, svg, _ in found
    }


def _drawn(svg, colour):
    """Shapes with an extent in this colour, outside the legend: lines, areas, bars, points."""
    legend = {
        e for g in svg.iter(f"{SVG}g") if g.get("id", "").startswith("legend") for e in g.iter()
    }
    return [
        element
        for element in svg.iter()
        if colour in (element.get("style") or "")
        and element not in legend
        and (element.tag == f"{SVG}use" or len(re.findall(r"[ML] ", element.get("d") or "")) >= 2)
    ]


def test_every_plot_is_there_with_its_data(evaluated):
    page, _ = evaluated
    figures = _figures(page.read_text())
    assert set(figures) == set(PLOTS)
    for title, models in PLOTS.items():
        for model in models:
            assert _drawn(figures[title], COLOURS[model]), (title, model)
        axes = [g for g in figures[title].iter(f"{SVG}g") if "axis" in g.get("id", "")]
        assert len(axes) == 2, title


def test_the_tables_hold_every_models_figures_with_their_intervals(evaluated):
    page, document = evaluated
    cells = _Page(page.read_text()).cells
    for model, figures in document["models"].items():
        assert NAMES[model] in cells
        for read_out in ("every", "last"):
            for metric, decimals in (("ppl", 1), ("ndcg@10", 4), ("hit@10", 4), ("mrr@10", 4)):
                interval = figures["intervals"][read_out][metric]
                value, low, high = (
                    f"{interval[part]:,.{decimals}f}" for part in ("value", "low", "high")
                )
                place = cells.index(value)
                assert f"{low} – {high}" in cells[place:], (model, read_out, metric)
    against = document["models"]["hrnn"]["against_champion"]["every"]["ppl"]
    assert f"× {against['value']:.3f}" in cells
    for kind in ("nothing: the first event", "never", "first event"):
        assert kind in cells


def test_nothing_is_fetched_and_nothing_runs(evaluated):
    text = evaluated[0].read_text()
    page = _Page(text)
    assert all(address.startswith("#") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert not re.search(r"url\((?!#|\"#|'#)|@import", text)


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_a_complaint_or_a_request(evaluated, tmp_path):
    page, document = evaluated
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *("--hide-scrollbars", "--window-size=1280,4000", f"--screenshot={picture}"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    assert done.stdout.count("<svg") == len(PLOTS)
    assert document["model_version"] in done.stdout
    if picture.exists():
        import matplotlib.image

        pixels = matplotlib.image.imread(picture)
        assert pixels.shape[:2] == (4000, 1280)
        coloured = np.ptp(pixels[..., :3], axis=2) > 0.3  # curves and bars, not text
        for part in np.array_split(coloured, 4):  # from top to bottom
            assert part.mean() > 0.0001
