"""The efficient block compiled by DenseNet.compile_block: the textbook's function, compiled once, and eager where there
is no compiler."""

import copy
import pickle
import warnings
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from common import about, differences, one_line, refused, relative, run_script, stopped_at
from test_efficient import assert_exact, pair, step

import compare_grads
import densenet
import numcheck
import train
from densenet import DenseNet
from lib.layers import COMPILED_PATHS, operations

torch._dynamo.config.recompile_limit = 64  # tests of one process compile for three dtypes and more kinds of tiles


def compiled(net: DenseNet, autocast: torch.dtype | None = None) -> DenseNet:
    with torch.autocast("cpu", autocast, enabled=autocast is not None), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert net.compile_block()
    return net


@pytest.fixture
def broken_compiler(monkeypatch):
    """torch.compile whose functions raise when they are called"""
    def compile_nothing(function, **_):
        def run(*_args):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nin any of these places")
        return run
    monkeypatch.setattr(torch, "compile", compile_nothing)
    densenet.tile_functions.cache_clear()
    yield
    densenet.tile_functions.cache_clear()


def test_without_a_compiler_the_block_warns_and_runs_as_before(broken_compiler):
    x, labels = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    torch.manual_seed(0)
    net = DenseNet(4, 10)
    before = torch.get_rng_state()
    expected = step(copy.deepcopy(net), x, labels)
    with pytest.warns(UserWarning, match="which failed: no compiler in any of these places$"):
        assert not net.compile_block()
    assert torch.equal(torch.get_rng_state(), before)
    found = step(net, x, labels)
    assert net.dense1.last_path == "efficient" and all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_run_without_a_compiler_trains_uncompiled_and_says_so(broken_compiler, flags, tmp_path, capsys):
    assert train.main([*flags, "--nEpochs", "1", "--compile", "--save", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "runs without torch.compile, which failed: no compiler in any" in one_line(err, "train.py: warning: ")
    assert "efficient path (torch.compile failed)" in out.splitlines()[0] and "compiled" not in out.splitlines()[0]
    assert about(tmp_path / "run")["path"] == "efficient"


def test_a_path_that_would_not_be_compiled_is_told():
    half = DenseNet(4, 10).bfloat16()
    with pytest.warns(UserWarning, match="failed: on cpu, in torch.bfloat16, the textbook layers run"):
        assert not half.compile_block()
    with (torch._dynamo.config.patch(disable=True),
          pytest.warns(UserWarning, match="failed: it is disabled by an environment variable of torch")):
        assert not DenseNet(4, 10).compile_block()


def test_the_textbook_layers_are_not_compiled():
    with pytest.raises(ValueError, match="efficient is False; valid for compile_block are True and 'max'"):
        DenseNet(4, 10, efficient=False).compile_block()


@pytest.mark.parametrize(("flags", "message"), [
    (["--efficient", "no"], "--efficient no trains by the textbook layers"),
    (["--syncBN"], "--syncBN trains by the textbook layers")])
def test_compile_with_the_textbook_layers_is_refused(flags, message, capsys):
    assert message in refused(train.main, capsys, "--compile", *flags)


def test_tools_refuse_to_compile_the_textbook_layers(capsys):
    assert "--compile is for the efficient block" in refused(compare_grads.main, capsys, "--compile")


@pytest.mark.slow
@pytest.mark.parametrize("efficient", [True, "max"])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_exact_in_float64_and_compiled_once(efficient, bottleneck, monkeypatch):
    """Layers of all sizes, whole and split into tiles, run by what compile_block has compiled."""
    monkeypatch.setattr(densenet, "TILE", 3 * 256)
    textbook, net = pair(efficient, growthRate=3, depth=22, bottleneck=bottleneck, reduction=0.37)
    textbook.double()
    compiled(net.double())
    compiled_functions = count_compiled()
    for n, size in ((2, 16), (8, 9), (8, 16)):
        x, labels = torch.randn(n, 3, size, size, dtype=torch.float64), torch.randint(10, (n,))
        expected, found = step(textbook, x, labels), step(net, x, labels)
        assert net.dense1.last_path == net.dense3.last_path == COMPILED_PATHS[efficient]
        assert_exact(expected, found)
    assert count_compiled() == compiled_functions


def count_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_each_function_may_run_uncompiled_among_compiled_ones(monkeypatch):
    """As it does beyond torch's limit of compiled versions."""
    monkeypatch.setattr(densenet, "TILE", 2 * 64)
    plain = densenet.tile_functions(False)
    traced = {name: torch.compile(f, dynamic=True, backend="eager") for name, f in vars(plain).items() if callable(f)}
    textbook, net = pair(True, growthRate=3, depth=10)
    x, labels = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(10, (5,))
    expected, net.block_is_compiled = step(textbook.double(), x, labels), True
    net.double()
    buffers = copy.deepcopy(net.state_dict())
    for name in traced:
        functions = SimpleNamespace(**traced | {name: getattr(plain, name), "compiled": True})
        monkeypatch.setattr(densenet, "tile_functions", lambda compiled, functions=functions: functions)
        net.load_state_dict(buffers)
        net.zero_grad()
        assert_exact(expected, step(net, x, labels))
        assert net.dense1.last_path == "compiled efficient"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_steps_compile_nothing_more(precision):
    net = DenseNet(4, 16).train()
    with train.autocast(torch.device("cpu"), precision):
        assert net.compile_block()
    compiled_functions = count_compiled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for n, height, width in ((40, 32, 32), (32, 32, 32), (5, 16, 24)):
        train.train_step(net, optimizer, precision, torch.randn(n, 3, height, width), torch.zeros(n).long(), n)
        assert net.dense1.last_path == "compiled efficient"
    assert count_compiled() == compiled_functions


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "allowed"), [(None, 2.0), (torch.bfloat16, 1.2)])
def test_float32_and_bfloat16_are_no_worse_than_the_textbook(autocast, allowed):
    """Errors against float64: the median over all tensors, and over seeds, since in some of them a ReLU flips."""
    errors = {"textbook": [], "ours": []}
    for seed in range(5):
        textbook, net = pair("max" if seed % 2 else True, seed, growthRate=8, depth=22)
        for each in (textbook, compiled(net, autocast)):
            for m in each.modules():
                if isinstance(m, nn.BatchNorm2d):
                    nn.init.ones_(m.weight), nn.init.zeros_(m.bias)
        x, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
        truth = step(copy.deepcopy(textbook).double(), x.double(), labels)
        for name, each in (("textbook", textbook), ("ours", net)):
            found = step(each, x, labels, autocast)
            errors[name].append(median(relative(found[k], v) for k, v in truth.items() if v.dtype == torch.float64))
        assert net.dense1.last_path == COMPILED_PATHS[net.efficient]
    assert median(errors["ours"]) <= allowed * median(errors["textbook"]), errors


@pytest.mark.slow
def test_copies_stay_compiled_and_keep_the_same_memory():
    net = compiled(DenseNet(4, 10))
    kept, paths = [], []
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), DenseNet(4, 10)):
        out = each(torch.randn(4, 3, 8, 8))
        saved = [node.saved_tensors for node in operations(out) if node.name() == "EfficientBlockBackward"]
        kept.append(sum(t.nbytes for tensors in saved for t in tensors))
        paths.append(each.dense1.last_path)
    assert paths == ["compiled efficient"] * 3 + ["efficient"]
    assert len(set(kept)) == 1 and kept[0] > 0


@pytest.mark.slow
def test_a_compiled_run_continues_to_the_same_bytes(flags, one_thread, tmp_path, capsys):
    flags = [*flags, "--compile", "--dropRate", "0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train.main([*flags, "--save", str(whole)]) == 0
    assert stopped_at("train_step", 8, [*flags, "--save", str(killed)]) == 143
    assert train.main(["--save", str(killed), "--resume", "--no-plot"]) == 0
    first_lines = [line for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    assert len(first_lines) == 3 and all("compiled efficient path (--compile)" in line for line in first_lines)
    assert differences(whole, killed) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cat-order", "cat-grad", "grad-scale", "bn-no-mean", "stats-twice"])
def test_tools_catch_each_fault_in_the_compiled_block(fault, capsys):
    assert compare_grads.main(["--against", "plain", "--compile", "--depth", "10", "--inject", fault]) == 1
    assert "first difference: " in capsys.readouterr().out


@pytest.mark.slow
def test_tools_find_the_compiled_block_correct(capsys):
    assert compare_grads.main(["--against", "plain", "--compile", "--efficient", "max", "--depth", "10"]) == 0
    assert numcheck.main(["--compile", "--depth", "10"]) == 0
    out = capsys.readouterr().out
    assert "tensors agree" in out and "network, compiled max" in out and "checks agree" in out


@pytest.mark.slow
def test_a_missing_cxx_compiler_is_told_in_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = run_script("train.py", *flags, "--nEpochs", "1", "--compile", "--save", tmp_path / "run")
    assert done.returncode == 0 and done.stderr.count("train.py: warning") == 1, done.stderr
    assert about(tmp_path / "run")["path"] == "efficient"
