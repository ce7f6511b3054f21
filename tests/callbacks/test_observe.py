"""``configs/callbacks/observe.yaml``: what two runs on MNIST leave behind, and how TensorBoard shows it in a browser.

The pictures in the documentation are screenshots of these tests, with whole epochs in place of short ones:
    OBSERVE="--trainer.max_epochs 3" SCREENSHOTS=docs python -m pytest tests/callbacks/test_observe.py
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig  # type: ignore[attr-defined]

from tests.callbacks.runs import events
from zo_lightning.__main__ import main
from zo_lightning.snapshots import read_snapshots

QUIET = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
SHORT = "--trainer.max_epochs 3 --trainer.limit_train_batches 20 --trainer.limit_val_batches 5"
LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
WEIGHTS = [f"net.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
FILTERS = ("net.conv1.weight", "net.conv2.weight")


@pytest.fixture(scope="module")
def logs(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A first-order run, and a zeroth-order one that is compared with it."""
    folder = tmp_path_factory.mktemp("observed")
    short = os.environ.get("OBSERVE", SHORT)
    common = f"fit -c mnist -c callbacks/observe --data.root {mnist_root} {short} {QUIET}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["zo-lightning"])
        log = "--trainer.logger TensorBoardLogger --trainer.logger.save_dir lightning_logs --trainer.logger.version ''"
        for name, words in {
            "first_order": "-c estimator/backprop",
            "zeroth_order": "-c estimator/zo_adamm --reference lightning_logs/first_order",
        }.items():
            assert main(shlex.split(f"{common} {words} {log} --trainer.logger.name {name}")) == 0
        yield folder / "lightning_logs"


@pytest.mark.parametrize("run", ["first_order", "zeroth_order"])
def test_losses_come_before_what_explains_them(logs: Path, run: str) -> None:
    """TensorBoard sorts the groups of tags by name, and shows twelve charts of one at a time."""
    groups = Counter(tag.partition("/")[0] for tag in events(logs / run).Tags()["scalars"])
    before = {name: count for name, count in groups.items() if name < "train"}
    assert set(before) <= {"budget", "epoch", "lr", "mu", "skipped_steps"}
    assert sum(before.values()) <= 12
    assert {name for name in groups if name > "val"} >= {"vs_true_gradient", "vs_start", "vs_flops", "weight_norm"}


@pytest.mark.parametrize("run", ["first_order", "zeroth_order"])
def test_everything_is_in_the_event_files(logs: Path, run: str) -> None:
    seen = events(logs / run)
    tags = seen.Tags()
    expected = {"train/loss_epoch", "val/loss", "val/acc", "vs_true_gradient/seconds"}
    expected |= {f"vs_true_gradient/{kind}/{name}" for kind in ("cosine", "norm_ratio", "expected_cosine") for name in WEIGHTS}
    expected |= {f"{kind}/{name}" for kind in ("weight_norm", "vs_start/cosine", "vs_start/l2") for name in WEIGHTS}
    if run == "zeroth_order":
        expected |= {"vs_true_gradient/noise_floor", "vs_true_gradient/slope_snr"}
        expected |= {f"vs_reference/{kind}/{name}" for kind in ("cosine", "l2") for name in (*WEIGHTS, "all")}
        expected |= {f"vs_reference/matched/{name}" for name in FILTERS}
    expected |= {f"vs_flops/{tag}" for tag in expected}
    expected |= {f"budget/{kind}" for kind in ("flops", "forward_passes", "examples", "seconds", "peak_memory_mb")}
    assert not expected - set(tags["scalars"])
    assert set(tags["histograms"]) == {f"weights/{name}" for name in WEIGHTS}
    assert set(tags["images"]) == {f"{kind}/{name}" for kind in ("filters", "filter_projection") for name in FILTERS}
    assert "custom_scalars__config__" in tags["tensors"]
    assert "_hparams_/session_start_info" in seen.summary_metadata
    assert [snapshot.epoch for snapshot in read_snapshots(logs / run)] == [0, 1, 2, 3]


@pytest.mark.parametrize("run", ["first_order", "zeroth_order"])
def test_images_decode(logs: Path, run: str, tmp_path: Path) -> None:
    seen = events(logs / run)
    for name in FILTERS:
        assert len(seen.Images(f"filters/{name}")) == 4  # the initialisation, and three epochs
        for kind in ("filters", "filter_projection"):
            for event in seen.Images(f"{kind}/{name}"):
                (tmp_path / "image.png").write_bytes(event.encoded_image_string)
                picture = Image.open(tmp_path / "image.png").convert("RGB")
                assert picture.size == (event.width, event.height)
                assert len(picture.getcolors(1 << 20) or []) > 5


@pytest.mark.parametrize(("run", "runs"), [("first_order", 1), ("zeroth_order", 2)])
def test_the_files_of_the_projector_load(logs: Path, run: str, runs: int) -> None:
    config = text_format.Parse((logs / run / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [one.tensor_name.partition(":")[0] for one in config.embeddings] == list(FILTERS)
    for one, weights in zip(config.embeddings, (25, 27), strict=True):
        points = np.loadtxt(logs / run / one.tensor_path)
        labels = (logs / run / one.metadata_path).read_text().splitlines()
        assert points.shape == (runs * 3 * 4, weights)
        assert len(labels) == 1 + len(points)


VISIBLE_TEXT = """
    const texts = [];
    const walk = node => {
        if (!node) return;
        if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) texts.push(node.textContent.trim());
        if (['STYLE', 'SCRIPT', 'NOSCRIPT', 'TEMPLATE'].includes(node.tagName)) return;
        if (node.shadowRoot) walk(node.shadowRoot);
        if (node.tagName === 'IFRAME' && node.contentDocument) walk(node.contentDocument.body);
        node.childNodes.forEach(walk);
    };
    walk(document.body);
    return texts;
"""
LOADED_IMAGES = """
    let loaded = 0;
    const walk = node => {
        if (node.tagName === 'IMG' && node.complete && node.naturalWidth > 0) loaded += 1;
        if (node.shadowRoot) walk(node.shadowRoot);
        node.childNodes.forEach(walk);
    };
    walk(document.body);
    return loaded;
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium, driven by Selenium."""
    program, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "needs Chromium and its driver (Debian, Ubuntu: apt install chromium chromium-driver)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--enable-unsafe-swiftshader",  # the projector draws by WebGL
        "--window-size=1200,1000",
    ):
        options.add_argument(argument)
    # Selenium gives each driver a profile of its own.
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def tensorboard(logs: Path) -> Iterator[str]:
    """The address of a TensorBoard that serves the runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs.name, "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    server = subprocess.Popen(command, cwd=logs.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/data/runs") as answer:
                return b"zeroth_order" in answer.read()
        except OSError:
            return False

    try:
        wait_until(answers)
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


PAGES = {
    "scalars": ["first_order", "zeroth_order", "train", "vs_true_gradient"],
    "images": ["first_order", "zeroth_order", "filter_projection/net.conv1.weight", "filters"],
    "custom_scalars": ["first_order", "zeroth_order", "Losses", "training loss", "validation accuracy", "cosine"],
    "hparams": ["first_order", "zeroth_order", "estimator", "ZerothOrder", "Backprop", "optimizer", "AdaMM", "val/acc"],
    "projector": ["first_order", "zeroth_order", "net.conv1.weight:", "layer", "epoch"],
}


@pytest.mark.parametrize("page", PAGES)
def test_browser_shows_the_runs(chromium: Any, tensorboard: str, page: str, tmp_path: Path) -> None:
    chromium.get("about:blank")  # an address that differs behind the # only is no new page
    chromium.get(f"{tensorboard}/#{page}")

    def missing() -> list[str]:
        texts = chromium.execute_script(VISIBLE_TEXT)
        return [word for word in PAGES[page] if not any(word in text for text in texts)]

    try:
        wait_until(lambda: not missing())
    except AssertionError:
        pytest.fail(f"the page {page} lacks {missing()}")
    if page == "images":
        wait_until(lambda: chromium.execute_script(LOADED_IMAGES) >= 4)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    if "SCREENSHOTS" in os.environ:
        time.sleep(5)  # until everything has moved to its place
    assert chromium.save_screenshot(str(folder / f"tensorboard_{page}.png"))
    assert len(Image.open(folder / f"tensorboard_{page}.png").convert("RGB").getcolors(1 << 24) or []) > 100
