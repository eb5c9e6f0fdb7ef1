"""The runs that come with the repository, work/*.reference: they can be read, drawn, loaded and continued."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import RECORD, ROOT, SAMPLE, contents, flat, resume, rows, run_refused
from matplotlib.image import imread

import densenet
import make_graph
import plot
import train

BC100, SGD, ADAM = (ROOT / f"work/{name}.reference" for name in ("cifar10-bc100", "cifar10", "cifar10-adam"))
RUNS = sorted((ROOT / "work").glob("*.reference"))
FIGURES = ("loss.png", "error.png", "loss-error.png")
CAT = 112  # the sample's test image that tests/cat.png shows
WRONG = 21  # of the sample's 200 test images, by BC 100-12's weights in float32


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def reference(request) -> Path:
    """A run of the repository; not to be written to."""
    return request.param


@pytest.fixture
def elsewhere(reference, tmp_path, monkeypatch) -> Path:
    """A copy of it, and as the current directory one without the run's data."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(reference, tmp_path / "run")


# --- what the files say -----------------------------------------------------------------------------------------

def test_there_are_three_of_together_less_than_13_megabytes():
    assert RUNS == [ADAM, BC100, SGD]
    assert sum(len(content) for run in RUNS for content in contents(run).values()) < 13e6


def test_no_path_of_the_machine_is_recorded(reference):
    checkpoint = densenet.read_checkpoint(reference / "latest.pth")
    for recorded in (json.loads((reference / "run.json").read_text()),
                     {name: value for name, value in checkpoint.items() if name not in ("model", "optimizer")}):
        texts = {name: value for name, value in flat(recorded).items() if isinstance(value, str)}
        assert [name for name, text in texts.items() if re.search(r"(^|\s)[/~]|:\\|\.\.", text)] == []
        assert recorded["flags"]["save"] == f"work/{reference.name}"


def test_csvs_checkpoint_and_run_json_agree(reference):
    checkpoint = densenet.read_checkpoint(reference / "latest.pth")
    about = json.loads((reference / "run.json").read_text())
    assert about == {name: checkpoint[name] for name in about}
    tested, trained = rows(reference / "test.csv"), rows(reference / "train.csv")
    epochs = checkpoint["flags"]["nEpochs"]
    assert [epoch for epoch, _, _ in tested] == list(range(1, epochs + 1)) and checkpoint["epoch"] == epochs
    assert len(trained) == epochs * -(-checkpoint["trainImages"] // checkpoint["flags"]["batchSz"])
    assert epochs - 1 < trained[-1][0] < epochs
    assert tested[-1][1:] == pytest.approx((checkpoint["test"]["loss"], checkpoint["test"]["error"]), rel=1e-4)
    assert checkpoint["best"]["error"] == pytest.approx(min(error for _, _, error in tested), rel=1e-4)
    assert checkpoint["csvLengths"] == {name: (reference / name).stat().st_size for name in ("train.csv", "test.csv")}


def test_a_plain_load_puts_finite_tensors_on_the_cpu(reference):
    content = torch.load(reference / "latest.pth", weights_only=True)
    tensors = [*content["model"].values(), *(t for s in content["optimizer"]["state"].values() for t in s.values())]
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in tensors)


def test_the_weights_load(reference):
    net = densenet.load(reference / "latest.pth")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert parameters == json.loads((reference / "run.json").read_text())["parameters"]
    assert parameters == (769_162 if reference == BC100 else 176_122)


# --- what one can do with them ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_plot_draws_the_figures_that_lie_there(reference, tmp_path):
    assert plot.main([str(reference), "--out", str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted(FIGURES)
    for name in FIGURES:
        assert_looks_like(tmp_path / name, reference / name)


@pytest.mark.slow
def test_the_figure_of_sgd_and_adam_is_of_their_csvs(tmp_path):
    assert plot.main([str(SGD), str(ADAM), "--labels", "SGD", "Adam", "--out", str(tmp_path)]) == 0
    for name in FIGURES:
        assert_looks_like(tmp_path / name, ROOT / "tests/figures/sgd-adam" / name)


def test_resuming_says_that_the_run_is_finished_and_needs_no_data(elsewhere, capfd):
    before = contents(elsewhere)
    assert resume(elsewhere) == 0
    out, err = capfd.readouterr()
    *_, (epochs, _, error) = rows(elsewhere / "test.csv")
    assert out.startswith(f"final test error {error:.2f}%, best ") and out.count("\n") == 1 and err == ""
    assert f" after {epochs:.0f} epochs" in out
    assert {name: content for name, content in contents(elsewhere).items() if name != ".lock"} == before


def test_more_epochs_need_the_same_images(elsewhere, capfd):
    assert "--data data is not to be found from here" in run_refused(capfd, elsewhere, "--resume", "--nEpochs", "31")
    said = run_refused(capfd, elsewhere, "--resume", "--nEpochs", "31", "--data", str(SAMPLE))
    assert f"--data {SAMPLE} holds other images" in said


@pytest.mark.slow
def test_how_many_of_the_samples_images_are_wrong(sample, capsys):
    assert train.main(["--evaluate", str(BC100 / "latest.pth"), "--data", sample, "--precision", "fp32"]) == 0
    percent, n = re.search(r"error (\S+)% of (\d+) images", capsys.readouterr().out).groups()
    assert n == "200" and abs(float(percent) * 2 - WRONG) <= 2


def test_readmes_lines_recognise_the_cat(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [lines] = re.findall(r"```python\n(import densenet, PIL.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(lines, {})
    name, probability = capsys.readouterr().out.split()
    assert name == "cat" and 0.99 < float(probability) <= 1


def test_the_cat_is_a_test_image():
    pixels = np.uint8((imread(ROOT / "tests/cat.png") * 255).round())
    image = (SAMPLE / "test_batch.bin").read_bytes()[CAT * RECORD:][:RECORD]
    assert image[0] == 3 and pixels.transpose(2, 0, 1).tobytes() == image[1:]


@pytest.mark.slow
def test_the_reuse_map_in_the_figures_is_of_these_weights(tmp_path):
    assert make_graph.main(["--graph", "reuse", "--checkpoint", str(BC100 / "latest.pth"), "--out", str(tmp_path)]) == 0
    assert_looks_like(tmp_path / "graph-reuse.png", ROOT / "tests/figures/reuse.png")


def assert_looks_like(drawn: Path, kept: Path) -> None:
    """Another version of matplotlib may draw lines and letters a little differently."""
    a, b = imread(drawn)[..., :3], imread(kept)[..., :3]
    assert a.shape == b.shape
    assert (np.abs(a - b).max(2) > 0.1).mean() < 0.03, f"{kept} is another figure"
