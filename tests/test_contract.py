"""What no version may change: numbers, names and files that users and their runs rely on.

The values were computed by version 1.1. ``tests/contract`` holds a run of that version that stopped after its first
epoch (``./train.py`` with V1_FLAGS), and the CSVs with which 1.1 ended it.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from common import efficient_blocks
from torchvision.transforms.functional import to_tensor

import densenet
import train
from densenet import DenseNet

TESTS = Path(__file__).resolve().parent
ROOT, CONTRACT, SAMPLE = TESTS.parent, TESTS / "contract", TESTS / "cifar10-sample"
MODES = {"no": False, "yes": True, "max": "max"}
V1_FLAGS = ["--depth", "10", "--growthRate", "4", "--efficient", "no", "--valSize", "100", "--dropRate", "0.2",
            "--nEpochs", "3", "--no-cuda", "--no-plot"]
FLAGS = {"arch", "batchSz", "border", "classes", "data", "dataset", "depth", "deterministic", "device", "dropRate",
         "efficient", "evaluate", "extra", "growthRate", "help", "imageSize", "initChannels", "lr", "nEpochs",
         "no-augment", "no-bottleneck", "no-cuda", "no-graph", "no-nesterov", "no-plot", "opt", "overwrite",
         "precision", "pretrained", "reduction", "resume", "save", "seed", "syncBN", "valSize", "weightDecay"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_rows(path: Path) -> list[tuple[float, ...]]:
    header, *lines = path.read_text().splitlines()
    assert header == "epoch,loss,error"
    return [tuple(map(float, line.split(","))) for line in lines]


# --- the recipe -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("efficient", MODES)
@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_losses_are_the_golden_ones(opt, efficient, tmp_path, monkeypatch):
    """In float64: only there do the results not depend on the processor."""
    build, features = DenseNet.__init__, DenseNet.features

    def build_in_float64(self, *args, **kwargs):
        torch.set_default_dtype(torch.float64)
        try:
            build(self, *args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    monkeypatch.setattr(DenseNet, "__init__", build_in_float64)
    monkeypatch.setattr(DenseNet, "features", lambda self, x: features(self, x.double()))
    data = tmp_path / "images"
    data.mkdir()
    for name, n in (("data_batch_1.bin", 40), ("test_batch.bin", 20)):
        (data / name).write_bytes((SAMPLE / name).read_bytes()[:n * 3073])
    flags = ["--depth", "10", "--growthRate", "4", "--initChannels", "6", "--batchSz", "8", "--nEpochs", "4",
             "--no-cuda", "--no-plot", "--opt", opt, "--efficient", efficient]
    assert train.main(["--data", str(data), *flags, "--save", str(tmp_path / "run")]) == 0
    golden = [line.split(",") for line in (TESTS / f"golden/{opt}.csv").read_text().splitlines()[1:]]
    for table in ("train", "test"):
        expected = [tuple(map(float, values)) for name, *values in golden if name == table]
        found = read_rows(tmp_path / f"run/{table}.csv")
        assert found == [pytest.approx(row, rel=1e-6) for row in expected]
    checkpoint = torch.load(tmp_path / "run/latest.pth", weights_only=True)
    assert checkpoint["test"]["loss"] == pytest.approx(expected[-1][1], rel=1e-8)


def test_initial_weights_by_seed():
    torch.manual_seed(1)
    state = DenseNet(growthRate=4, depth=10).state_dict()
    expected = json.loads((CONTRACT / "weights.json").read_text())
    assert [*state] == [*expected]
    for name, value in state.items():
        values = value.double().flatten()
        assert [*value.shape] == expected[name]["shape"]
        assert [values[0], values[-1], values.abs().sum()] == pytest.approx(expected[name]["values"], rel=1e-6), name


# --- the network ------------------------------------------------------------------------------------------------

def training_step(net: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    out = net(images)
    loss = F.nll_loss(out, torch.arange(len(images)) % 10)
    gradients = torch.autograd.grad(loss, [*net.parameters()])
    return [out.detach(), *gradients, *(buffer.clone() for buffer in net.buffers())]


def test_textbook_layers_equal_torchvision_bit_for_bit():
    torch.manual_seed(0)
    ours = DenseNet(8, blockConfig=(3, 4, 3), smallInputs=False, efficient=False)
    theirs = torchvision.models.DenseNet(8, (3, 4, 3), 16, num_classes=10)
    theirs.load_state_dict(ours.torchvision_state_dict())
    images = torch.randn(4, 3, 64, 64)
    ours, theirs = (training_step(net, images) for net in (ours, nn.Sequential(theirs, nn.LogSoftmax(1))))
    assert len(ours) == len(theirs) and all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("seed", range(24))
def test_block_equals_textbook_layers(seed, monkeypatch):
    draw = random.Random(seed)
    bottleneck, dropRate = draw.random() < 0.6, draw.choice([0.0, 0.0, 0.2, 0.5])
    arguments = dict(growthRate=draw.choice([1, 3, 4, 7, 12]), bottleneck=bottleneck, dropRate=dropRate,
                     depth=4 + (6 if bottleneck else 3) * draw.choice([1, 2, 4]), inChannels=draw.choice([1, 3]),
                     reduction=draw.choice([0.5, 1.0, 0.37]), initChannels=draw.choice([None, 5, 16]))
    momentum, eps = draw.choice([0.1, 0.01, 1.0]), draw.choice([1e-5, 1e-3])
    size = draw.choice([1, 2, 5]), arguments["inChannels"], draw.choice([8, 9, 16, 21]), draw.choice([8, 11, 16])
    torch.manual_seed(seed)
    textbook = DenseNet(**arguments, efficient=False)
    for m in textbook.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum, m.eps = momentum, eps
            nn.init.normal_(m.weight, 0.3, 0.6), nn.init.normal_(m.bias, 0.3, 0.6)  # gammas of both signs
    textbook.double()
    images = torch.randn(size, dtype=torch.float64)
    if draw.random() < 0.5:
        images = images.to(memory_format=torch.channels_last)
    calls = []

    def dropout(x, p=0.5, training=True, inplace=False):  # the same masks in any layout
        generator = torch.Generator().manual_seed(len(calls))
        calls.append(p)
        return x * (torch.rand(x.shape, generator=generator, dtype=torch.float64) >= p) / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)
    if not dropRate and draw.random() < 0.5:
        monkeypatch.setattr(densenet, "TILE", 176, raising=False)  # several tiles
    block = DenseNet(**arguments, efficient=draw.choice([True, "max"])).double()
    for new, old in zip(block.modules(), textbook.modules(), strict=True):
        if isinstance(old, nn.BatchNorm2d):
            new.momentum, new.eps = old.momentum, old.eps
    block.load_state_dict(textbook.state_dict())
    expected = training_step(textbook, images)
    calls.clear()
    found = training_step(block, images)
    assert efficient_blocks(block(images)) == 3 and efficient_blocks(textbook(images)) == 0
    scale = max(value.norm().item() for value in expected[1:1 + len([*block.parameters()])])
    for a, b in zip(expected, found, strict=True):
        a, b = a.double(), b.double()  # gradients of biases before a norm are nothing but rounding: hence the scale
        assert (a - b).norm() <= 1e-10 * max(a.norm().item(), 1e-4 * scale)


def test_block_keeps_a_sixth_of_the_bytes_and_max_a_twentieth():
    kept = {}
    for name, efficient in MODES.items():
        net, storages = DenseNet(efficient=efficient), {}
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(torch.randn(4, 3, 32, 32))
        kept[name] = sum(size for pointer, size in storages.items() if pointer not in own)
        del out
    assert kept["yes"] < 0.17 * kept["no"] and kept["max"] < 0.05 * kept["no"]


# --- runs and files ---------------------------------------------------------------------------------------------

def test_committed_runs_load_and_recognise_the_cat():
    for run in sorted(ROOT.glob("work/*.reference")):
        net = densenet.load(run / "latest.pth")
        assert len(net.classes) == 10 and not net.training
    net = densenet.load(ROOT / "work/cifar10.reference/latest.pth")
    out = net(((to_tensor(PIL.Image.open(TESTS / "cat.png").convert("RGB")) - net.mean) / net.std)[None])
    assert net.classes[out.argmax()] == "cat" and out.exp().max().item() == pytest.approx(0.99998, abs=2e-5)


def test_a_run_of_version_1_1_goes_on(tmp_path):
    run = shutil.copytree(CONTRACT / "run", tmp_path / "run")
    for file in run.iterdir():
        file.chmod(0o644)
    assert train.main(["--save", str(run), "--data", str(SAMPLE), "--resume", "--no-plot"]) == 0
    for name in ("train.csv", "val.csv", "test.csv"):
        before, ended = CONTRACT / "run" / name, CONTRACT / "ended" / name
        assert (run / name).read_bytes().startswith(before.read_bytes())
        found, expected = read_rows(run / name), read_rows(ended)
        assert [row[0] for row in found] == [row[0] for row in expected]
        assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-3)


def test_rows_of_a_csv(tmp_path):
    flags = ["--data", str(SAMPLE), "--depth", "10", "--growthRate", "4", "--batchSz", "400", "--no-cuda", "--no-plot"]
    assert train.main([*flags, "--nEpochs", "1", "--save", str(tmp_path)]) == 0
    text = (tmp_path / "train.csv").read_text()
    number = r"\d\.\d{1,6}"
    assert re.fullmatch(rf"epoch,loss,error\n0,{number},[\d.]+\n0.333333333,{number},[\d.]+\n0.666666667,{number},"
                        r"[\d.]+\n", text)
    assert re.fullmatch(rf"epoch,loss,error\n1,{number},[\d.]+\n", (tmp_path / "test.csv").read_text())


def test_flags_stay(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE)) >= FLAGS


def test_densenet_is_one_file_that_needs_torch_only(tmp_path):
    shutil.copy(ROOT / "densenet.py", tmp_path)
    code = ("import sys, densenet, torch\nassert densenet.DenseNet(4, 10)(torch.randn(2, 3, 8, 8)).shape == (2, 10)\n"
            "assert not {'torchvision', 'pandas', 'matplotlib', 'lib', 'train'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_plot_is_one_file(tmp_path):
    shutil.copy(ROOT / "plot.py", tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("train.csv", "test.csv"):
        shutil.copy(ROOT / "work/cifar10.reference" / name, tmp_path / "run")
    subprocess.run([sys.executable, "plot.py", "run"], cwd=tmp_path, check=True)
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"loss.png", "error.png", "loss-error.png"}


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_contract.py: writes weights.json, by version 1.1
    torch.manual_seed(1)
    values = {name: value.double().flatten() for name, value in DenseNet(growthRate=4, depth=10).state_dict().items()}
    shapes = {name: [*value.shape] for name, value in DenseNet(growthRate=4, depth=10).state_dict().items()}
    (CONTRACT / "weights.json").write_text(json.dumps(
        {name: {"shape": shapes[name], "values": [v[0].item(), v[-1].item(), v.abs().sum().item()]}
         for name, v in values.items()}, indent=1) + "\n")
