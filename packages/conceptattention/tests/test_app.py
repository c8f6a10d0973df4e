"""The web page: what it draws, and a running server asked as a browser asks it."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from conceptattention import app, cli

NEEDS = "needs the extra `app` (gradio)"


def test_draw_gives_the_picture_of_the_plain_pipeline_and_named_overlays(demo_pipe):
    from conceptattention.demo.run import generate

    picture, maps = app.draw(demo_pipe, "a fish on water", "fish, water ,bee", seed=3, steps=2)
    plain = generate(demo_pipe, "a fish on water", 3, 2, 3.0)
    assert picture.tobytes() == plain.resize((512, 512), Image.Resampling.NEAREST).tobytes()
    assert [word for _, word in maps] == ["fish", "water", "bee"]
    assert {overlay.size for overlay, _ in maps} == {(512, 512)}
    assert len({overlay.tobytes() for overlay, _ in maps}) == 3


def test_draw_with_another_pipeline(flux, monkeypatch):
    monkeypatch.setattr(flux, "default_sample_size", 8)
    picture, maps = app.draw(flux, "a cat on grass", "cat,grass", steps=1)
    assert [word for _, word in maps] == ["cat", "grass"]
    assert picture.size == maps[0][0].size == (512, 512)


@pytest.mark.parametrize(
    ("prompt", "concepts", "message"),
    [
        (" ", "fish", "Type a prompt"),
        ("a fish", " , ", "at least one concept"),
        ("a fish", "zeppelin", "words of the demo model"),
    ],
)
def test_mistakes_have_a_message(demo_pipe, prompt, concepts, message):
    with pytest.raises(ValueError, match=message):
        app.draw(demo_pipe, prompt, concepts)


def test_without_gradio_the_command_says_what_to_install(demo_pipe, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda model, device: demo_pipe)
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.main, ["app"])
    assert result.exit_code == 2
    assert "pip install 'conceptattention[app]'" in result.output


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of the embedded model in a process of its own."""
    pytest.importorskip("gradio", reason=NEEDS)
    command = [sys.executable, "-m", "conceptattention", "app", "--port", "0", "--device", "cpu"]
    folder = tmp_path_factory.mktemp("server")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as server:
        try:
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line + server.stderr.read()
            yield found[0]
        finally:
            server.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_the_running_page_draws(address, tmp_path):
    client_module = pytest.importorskip("gradio_client", reason=NEEDS)
    client = client_module.Client(address, verbose=False, download_files=str(tmp_path))
    words = "fish, water"
    picture, maps = client.predict("a fish on water", words, 1, 2, api_name="/draw")
    with pytest.raises(client_module.exceptions.AppError, match="words of the demo model"):
        client.predict("a fish", "zeppelin", 1, 2, api_name="/draw")
    from conceptattention.demo.model import load_pipeline

    expected, overlays = app.draw(load_pipeline(), "a fish on water", words, seed=1, steps=2)
    assert Image.open(picture).convert("RGB").tobytes() == expected.tobytes()
    assert [entry["caption"] for entry in maps] == ["fish", "water"]
    for entry, (overlay, _) in zip(maps, overlays, strict=True):
        assert Image.open(entry["image"]).convert("RGB").tobytes() == overlay.tobytes()


@pytest.mark.slow
def test_a_browser_types_concepts_and_sees_overlays(address):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = (os.environ.get("CHROMIUM", ""), "chromium-headless-shell", "chromium", "google-chrome")
    browser_path = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if browser_path is None:
        pytest.skip("needs a Chromium on the path, or its path in CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        failures = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        page.get_by_label("Concepts, separated by commas").fill("bee, snow")
        page.get_by_label("Prompt").fill("a bee on snow")
        page.get_by_label("number input for Steps").fill("2")
        page.get_by_role("button", name="Run").click()
        gallery = page.locator(".gallery-item, .thumbnail-item")
        gallery.nth(1).wait_for(timeout=120_000)
        text = page.locator("body").inner_text()
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        page.get_by_label("Concepts, separated by commas").fill("zeppelin")
        page.get_by_role("button", name="Run").click()
        page.get_by_text("must be words of the demo model").first.wait_for(timeout=60_000)
        browser.close()
    assert not failures
    assert {"bee", "snow"} <= set(text.split("\n"))
    assert sum(width == 512 for width in widths) >= 3  # the picture and two overlays


def test_the_page_holds_every_field(demo_pipe):
    gradio = pytest.importorskip("gradio", reason=NEEDS)
    page = app.build(demo_pipe)
    labels = [getattr(block, "label", None) for block in page.blocks.values()]
    for label in ("Prompt", "Seed", "Steps", "Picture", "Maps"):
        assert label in labels
    assert isinstance(page, gradio.Blocks)


def test_models_that_cannot_be_observed_have_no_page():
    for denoiser, message in (
        (None, "`pipe` must be a diffusers pipeline with a transformer; it has none"),
        (torch.nn.Linear(1, 1), "transformer of class Linear, which no adapter knows"),
    ):
        with pytest.raises(ValueError, match=message):
            app.build(type("Pipe", (), {"transformer": denoiser})())
