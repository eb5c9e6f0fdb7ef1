"""The runs that come with the repository, work/*.reference: they can be read, drawn, loaded and continued."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, contents, flat, resume, rows
from matplotlib.image import imread

import densenet
import make_graph
import plot
import train

BC100, SGD, ADAM = (ROOT / f"work/{name}.reference" for name in ("cifar10-bc100", "cifar10", "cifar10-adam"))
WRONG = 21  # of the sample's 200 test images, by BC 100-12's weights in float32


@pytest.fixture(params=[BC100, SGD, ADAM], ids=lambda run: run.name)
def reference(request) -> Path:
    """A run of the repository; not to be written to."""
    return request.param


def text_of(readme: str) -> str:
    return " ".join((ROOT / readme).read_text().split())


# --- what the files say -----------------------------------------------------------------------------------------

def test_the_readmes_give_each_runs_parameters_epochs_and_errors(reference):
    tested, about = rows(reference / "test.csv"), text_of("work/README.md")
    last, (best, epoch) = tested[-1][2], min((error, epoch) for epoch, _, error in tested)
    parameters = sum(parameter.numel() for parameter in densenet.load(reference / "latest.pth").parameters())
    assert re.search(rf"\| \[{reference.name}\][^|]*\|[^|]*\| {parameters:,} \| {len(tested)} \| {last:.2f}% "
                     rf"\| {best:.2f}%, epoch {epoch:.0f} \| n=1 \|", about)
    assert f"| {reference.name} | {last:.2f}% |" in about


def test_the_other_numbers_of_the_readmes_agree_with_the_csvs():
    readme, about = text_of("README.md"), text_of("work/README.md")
    bc100, sgd, adam = (f"{rows(run / 'test.csv')[-1][2]:.2f}%" for run in (BC100, SGD, ADAM))
    assert f"| **30** | {bc100} |" in readme and f"SGD {sgd}, Adam at a constant rate {adam}" in readme
    trained = np.mean([error for epoch, _, error in rows(BC100 / "train.csv") if epoch >= 29])
    assert f"Over the last epoch the mean training error is {trained:.1f}%." in about
    size = sum(len(content) for run in (BC100, SGD, ADAM) for content in contents(run).values())
    assert f"They take {size / 1e6:.1f} MB." in about


def test_csvs_checkpoint_and_run_json_agree(reference):
    checkpoint = densenet.read_checkpoint(reference / "latest.pth")
    about = json.loads((reference / "run.json").read_text())
    assert about == {name: checkpoint[name] for name in about}
    tested, trained = rows(reference / "test.csv"), rows(reference / "train.csv")
    epochs = checkpoint["flags"]["nEpochs"]
    assert [epoch for epoch, _, _ in tested] == list(range(1, epochs + 1)) and checkpoint["epoch"] == epochs
    assert len(trained) == epochs * -(-checkpoint["trainImages"] // checkpoint["flags"]["batchSz"])
    assert tested[-1][1:] == pytest.approx((checkpoint["test"]["loss"], checkpoint["test"]["error"]), rel=1e-4)
    assert checkpoint["best"]["error"] == pytest.approx(min(error for _, _, error in tested), rel=1e-4)


def test_no_path_of_the_machine_is_recorded(reference):
    checkpoint = densenet.read_checkpoint(reference / "latest.pth")  # run.json holds the same
    texts = {name: value for name, value in flat(checkpoint).items() if isinstance(value, str)}
    assert [name for name, text in texts.items() if re.search(r"(^|\s)[/~]|:\\|\.\.", text)] == []
    assert checkpoint["flags"]["save"] == f"work/{reference.name}"


def test_a_plain_load_puts_finite_tensors_on_the_cpu(reference):
    content = torch.load(reference / "latest.pth", weights_only=True)
    tensors = [*content["model"].values(), *(t for s in content["optimizer"]["state"].values() for t in s.values())]
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in tensors)


# --- what one can do with them ----------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize(("runs", "kept"), [
    ([BC100], BC100), ([SGD], SGD), ([ADAM], ADAM),
    ([SGD, ADAM, "--labels", "SGD", "Adam"], ROOT / "tests/figures/sgd-adam")], ids=["bc100", "sgd", "adam", "both"])
def test_the_kept_figures_are_drawn_from_the_csvs(runs, kept, tmp_path):
    assert plot.main([*map(str, runs), "--out", str(tmp_path)]) == 0
    for name in plot.FIGURES:
        assert_looks_like(tmp_path / name, kept / name)


@pytest.mark.slow
def test_the_kept_reuse_map_is_drawn_from_the_weights(tmp_path):
    assert make_graph.main(["--graph", "reuse", "--checkpoint", str(BC100 / "latest.pth"), "--out", str(tmp_path)]) == 0
    assert_looks_like(tmp_path / "graph-reuse.png", ROOT / "tests/figures/reuse.png")


def test_resuming_says_that_the_run_is_finished_and_needs_no_data(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no data/
    run = shutil.copytree(reference, tmp_path / "run")
    before = contents(run)
    assert resume(run) == 0
    out, err = capsys.readouterr()
    *_, (epochs, _, error) = rows(run / "test.csv")
    assert out.startswith(f"final test error {error:.2f}%, best ") and out.count("\n") == 1 and err == ""
    assert f" after {epochs:.0f} epochs" in out and contents(run) == before


@pytest.mark.slow
def test_all_but_about_21_of_the_samples_200_test_images_are_recognised(sample, capsys):
    assert train.main(["--evaluate", str(BC100 / "latest.pth"), "--data", sample, "--precision", "fp32"]) == 0
    percent, n = re.search(r"error (\S+)% of (\d+) images", capsys.readouterr().out).groups()
    assert n == "200" and abs(float(percent) * 2 - WRONG) <= 2


def test_readmes_lines_recognise_the_cat(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [lines] = re.findall(r"```python\n(import densenet, PIL.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(lines, {})
    name, probability = capsys.readouterr().out.split()
    assert name == "cat" and 0.99 < float(probability) <= 1


def assert_looks_like(drawn: Path, kept: Path) -> None:
    """Another version of matplotlib may draw lines and letters a little differently."""
    a, b = imread(drawn)[..., :3], imread(kept)[..., :3]
    assert a.shape == b.shape
    assert (np.abs(a - b).max(2) > 0.1).mean() < 0.03, f"{kept} is another figure"
