"""numcheck.py: correct gradients pass, each fault is caught and located, and the check itself is sound."""

import re

import matplotlib.image
import pytest
import torch
import torch.nn as nn
from common import refused, run_script

import densenet
import numcheck
from densenet import DenseNet
from lib.faults import FAULTS, WRONG_GRADIENTS
from lib.layers import settle_kinks

SMALL = ["--depth", "10", "--growthRate", "3"]
LAYERS = ["SingleLayer", "Bottleneck", "Transition"]
BLOCKS = ["efficient block of SingleLayer", "efficient block of Bottleneck", "efficient block of Bottleneck, max"]
NETWORKS = ["network, textbook", "network, efficient", "network, max"]
CASES = LAYERS + BLOCKS + NETWORKS


def run(capsys, *args):
    """-> exit status, lines of stdout"""
    status = numcheck.main([*SMALL, *args])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out.splitlines()


def verdicts(lines, backend="CPU"):
    """-> from one backend's table: case -> ("ok" or "DIFFERS", the gradient that is named)"""
    start = next(i for i, line in enumerate(lines) if line.startswith(backend + " "))
    end = lines.index("", start)
    rows = [re.fullmatch(r"(\S.*?)  +\d+  +\S+  +\S+  (ok|DIFFERS) +(\S.*)", line) for line in lines[start + 1:end]]
    return {row[1]: (row[2], row[3]) for row in rows}


def flags(*argv):
    return numcheck.get_args_parser().parse_args([*SMALL, *argv])


@pytest.mark.slow
def test_the_script_finds_all_gradients_right_and_draws_the_figure(tmp_path):
    figure = tmp_path / "numcheck.png"
    figure.write_bytes(b"an older figure, longer than nothing")
    done = run_script("numcheck.py", *SMALL, "--plot", figure, MPLBACKEND="module://nowhere")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert {name: found for name, (found, _) in verdicts(lines).items()} == dict.fromkeys(CASES, "ok")
    assert re.match(r"all \d{4} checks agree: ", lines[-1])
    image = matplotlib.image.imread(figure)[..., :3]
    assert image.shape == (600, 1800, 3) and 0.02 < (image < 0.9).any(2).mean() < 0.3
    assert [path.name for path in tmp_path.iterdir()] == [figure.name]
    if not torch.cuda.is_available():
        assert "skipped CUDA with cuDNN on and off: this machine has no GPU that PyTorch can use" in lines


# The first wrong gradient of the backward pass in each of CASES. None: a transition has no concatenation. In the
# efficient block one statement computes the mean term of all layers, so that its last layer is wrong, too.
PLACES = {
    "cat-grad": ["input", "input", None, "layer 0.conv1.weight", "layer 0.conv2.weight", "layer 0.conv2.weight",
                 "trans1", "trans1", "trans1"],
    "grad-scale": 3 * ["conv1.weight"] + 3 * ["layer 1.conv1.weight"] + 3 * ["dense2.0"],
    "bn-no-mean": ["input", "conv1.weight", "input", "layer 1.conv1.weight", "layer 1.conv2.weight",
                   "layer 1.conv2.weight", "dense2.0", "dense3.0", "dense3.0"]}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLACES)
def test_every_fault_is_caught_and_located(fault, capsys, monkeypatch):
    monkeypatch.setattr(numcheck, "STEPS", numcheck.STEPS[:1])  # a wrong gradient would try all steps
    status, lines = run(capsys, "--inject", fault)
    assert status == 1
    for (name, found), place in zip(verdicts(lines).items(), PLACES[fault], strict=True):
        assert found == ("DIFFERS", place) if place else found[0] == "ok", name
    assert list(verdicts(lines)) == CASES
    assert re.fullmatch(rf"first difference: SingleLayer, gradient of {PLACES[fault][0]}: error \S+, limit 1e-07",
                        lines[-1])


def test_every_fault_of_inject_is_tested():
    assert tuple(PLACES) == WRONG_GRADIENTS


@pytest.mark.parametrize("path", ["textbook", "efficient", "max"])
@pytest.mark.parametrize("fault, first", [("grad-scale", "dense2.0"), ("cat-grad", None)])
def test_gradients_between_the_loss_and_the_fault_are_right(path, fault, first):
    torch.manual_seed(0)
    case = numcheck.network_case(flags("--inject", fault), path, "cpu")
    results, _ = numcheck.check(case, plotted=False)
    wrong = [r.group for r in results if r.differs]
    after_fault = ["fc", "bn1", "dense3.0", "trans2"]  # in the forward pass
    assert [r.group for r in results][:len(after_fault)] == after_fault and not set(after_fault) & set(wrong)
    if first:
        assert wrong == [first]
    else:
        assert {"input", "conv1", "dense1.0"} <= set(wrong)


@pytest.mark.slow
def test_the_error_falls_with_the_square_of_the_step_and_rises_with_rounding():
    torch.manual_seed(0)
    for case in (numcheck.module_case(densenet.Bottleneck(4, 2), None, "cpu"),
                 numcheck.block_case(densenet.Bottleneck, "efficient", None, "cpu")):
        _, errors = numcheck.check(case, plotted=True)
        at = {round(torch.tensor(step).log10().item() * 2): error for step, error in errors.items()}
        assert 30 < at[-8] / at[-10] < 300  # from 1e-4 to 1e-5
        assert at[-20] > 30 * at[-12] and min(at.values()) < 1e-9


def test_slope_is_the_derivative_along_a_direction_and_restores_the_tensors():
    x, y = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    direction = [torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)]
    slope = numcheck.slope(lambda: (x ** 2).sum() * y.sum(), [x, y], direction, 1e-3)
    assert slope == pytest.approx((2 * 1 - 2 * 2) * 0.3 + 5 * 2, rel=1e-5)
    assert x.tolist() == [1.0, 2.0] and y.tolist() == [0.3]


@pytest.mark.parametrize("efficient", [False, True])
def test_after_settle_kinks_no_relu_has_an_input_near_zero(efficient):
    torch.manual_seed(0)
    net, x = DenseNet(4, 10, efficient=efficient).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {name: p.clone() for name, p in net.named_parameters()}
    least = settle_kinks(net, x)
    assert not any(norm._forward_hooks for norm in norms)
    nearest = []
    for norm in norms:
        norm.register_forward_hook(lambda _, inputs, out: nearest.append(out.abs().min().item()))
    net(x)
    assert len(nearest) == len(norms) == 9 and min(nearest) == pytest.approx(least) and least > 1e-4
    for name, p in net.named_parameters():
        moved = (p - before[name]).abs().max().item()
        assert moved < 0.1 if re.search(r"bn\d\.bias", name) else moved == 0


@pytest.mark.slow
def test_it_fails_if_the_textbook_path_runs_instead_of_the_efficient_path(capsys, monkeypatch):
    monkeypatch.setattr(densenet, "can_be_efficient", lambda *_: False)
    assert numcheck.main(SMALL) == 1
    out, err = capsys.readouterr()
    assert err == ("numcheck.py: error: dense1 took the textbook path instead of the efficient path, so the check says "
                   "nothing\n")
    assert "agree" not in out


@pytest.mark.parametrize("loss", [lambda x: (x * float("nan")).sum(), lambda x: (x.detach() * 2 + 0 * x).sum()],
                         ids=["nan", "lost"])
def test_a_gradient_that_is_nan_or_lost_differs(loss):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert numcheck.check_group(lambda: loss(x), numcheck.elements("x", x), [1e-6], 1e-7).differs


@pytest.mark.parametrize("args, named", [
    (["--depth", "23"], "depth is 23; valid with bottleneck is 6n + 4, nearest 22 and 28"),
    (["--depth", "many"], "'many'"), (["--growthRate", "1"], "whole number from 2 to 64"),
    (["--reduction", "0"], "'0'; valid is above 0 and at most 1"), (["--reduction", "2"], "at most 1"),
    (["--no-bottleneck", "--depth", "23"], "3n + 4, nearest 22 and 25"), (["--seed", "-1"], "'-1'"),
    (["--inject", "bad-luck"], "'cat-grad', 'grad-scale', 'bn-no-mean'"),
    (["--plot", "figure.pdf"], "ends in .png"), (["--plot", "no/such/dir/figure.png"], "existing, writable directory"),
    (["--what"], "--what"),
])
def test_bad_input_is_refused_in_one_line(args, named, capsys):
    assert named in refused(numcheck.main, capsys, *args)


def test_help_explains_every_fault(capsys):
    with pytest.raises(SystemExit) as stop:
        numcheck.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for fault in WRONG_GRADIENTS:
        assert f"{fault} ({FAULTS[fault]})" in text
