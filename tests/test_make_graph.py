"""make_graph.py: the .dot files hold the real network, the picture of a block is right, errors are one line."""

import inspect
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
import torch.nn as nn
from common import full_disk, one_line, refused, run_script
from matplotlib.image import imread
from matplotlib.patches import FancyArrowPatch

import make_graph
from densenet import DenseNet

needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")


@pytest.fixture
def no_dot(monkeypatch):
    monkeypatch.setenv("PATH", "")


def fake_dot(folder: Path, monkeypatch, script: str) -> None:
    folder.mkdir()
    (folder / "dot").write_text(script)
    (folder / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def read_dot(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """-> the label of each node, the edges"""
    nodes, edges = {}, []
    for text in path.read_text().splitlines():
        if match := re.fullmatch(r'"([^"]*)" -> "([^"]*)" \[(.*)\];', text):
            source, target, attributes = match.groups()
            edges.append((target, source) if 'dir="back"' in attributes else (source, target))
        elif match := re.fullmatch(r'"([^"]*)" \[.*?label="([^"]*)".*\];', text):
            assert match[1] not in nodes, "declared twice"
            nodes[match[1]] = match[2]
    assert {name for edge in edges for name in edge} <= set(nodes)
    return nodes, edges


def shape(label: str) -> list[int]:
    """The numbers of a label's last line."""
    return [int(number) for number in re.findall(r"\d+", label.split("\\n")[-1])]


def assert_leads_to(end: str, nodes: dict[str, str], edges: list[tuple[str, str]]) -> None:
    """Asserts that there is no cycle, and that a path leads from every node to ``end`` (Kahn's algorithm)."""
    n_edges_left = Counter(source for source, _ in edges)
    ready, done = [name for name in nodes if not n_edges_left[name]], []
    assert ready == [end]
    while ready:
        done.append(ready.pop())
        for source, target in edges:
            if target == done[-1]:
                n_edges_left[source] -= 1
                if not n_edges_left[source]:
                    ready.append(source)
    assert sorted(done) == sorted(nodes)


# --- autograd ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, net", [
    (["--depth", "16"], DenseNet(growthRate=4, depth=16)),
    (["--depth", "10", "--no-bottleneck", "--reduction", "1"], DenseNet(4, 10, reduction=1, bottleneck=False)),
])
def test_autograd_shows_each_operation_and_parameter_once(tmp_path, no_dot, flags, net):
    assert make_graph.main(["--graph", "autograd", "--growthRate", "4", "--out", str(tmp_path), *flags]) == 0
    nodes, edges = read_dot(tmp_path / "graph-autograd.dot")
    parameters = {name: f"{name}\\n{tuple(p.shape)}" for name, p in net.named_parameters()}
    leaves = {name: label for name, label in nodes.items() if not name.startswith("operation")}
    assert leaves == parameters | {"image": "image\\n(1, 3, 32, 32)", "output": "output\\n(1, 10)"}
    kinds = Counter(re.sub(r"\d+$", "", label) for name, label in nodes.items() if name not in leaves)
    modules = Counter(type(m) for m in net.modules())
    assert kinds["ConvolutionBackward"] == modules[nn.Conv2d]
    assert kinds["NativeBatchNormBackward"] == kinds["ReluBackward"] == modules[nn.BatchNorm2d]
    assert kinds["CatBackward"] == sum(len(block) for block in (net.dense1, net.dense2, net.dense3))
    assert Counter(source for source, _ in edges if source in leaves) == dict.fromkeys(leaves.keys() - {"output"}, 1)
    assert_leads_to("output", nodes, edges)


def test_a_weight_leads_to_the_convolution_that_follows_its_batch_norm(tmp_path, no_dot):
    make_graph.main(["--graph", "autograd", "--growthRate", "4", "--depth", "10", "--out", str(tmp_path)])
    nodes, edges = read_dot(tmp_path / "graph-autograd.dot")
    target = dict(edges)  # right for leaves only: they have one edge each
    assert nodes[target["dense2.0.conv2.weight"]] == "ConvolutionBackward0"
    assert nodes[target["dense2.0.bn2.weight"]] == "NativeBatchNormBackward0"
    relu, = (source for source, to in edges if to == target["dense2.0.conv2.weight"] and source.startswith("operation"))
    assert (target["dense2.0.bn2.weight"], relu) in edges


def test_the_efficient_block_is_one_operation(tmp_path, no_dot):
    make_graph.main(["--graph", "autograd", "--growthRate", "4", "--depth", "16", "--efficient", "yes",
                     "--out", str(tmp_path)])
    nodes, edges = read_dot(tmp_path / "graph-autograd.dot")
    assert list(nodes.values()).count("EfficientBlockBackward") == 3
    assert "CatBackward0" not in nodes.values()
    assert nodes.keys() >= {name for name, _ in DenseNet(4, 16).named_parameters()}
    assert_leads_to("output", nodes, edges)


@pytest.mark.slow
def test_a_deep_network_is_drawn_within_the_recursion_limit(tmp_path, no_dot):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert make_graph.main(["--graph", "autograd", "--growthRate", "4", "--depth", "250",
                                "--out", str(tmp_path)]) == 0
    finally:
        sys.setrecursionlimit(limit)
    nodes, _ = read_dot(tmp_path / "graph-autograd.dot")
    assert list(nodes.values()).count("CatBackward0") == 123


# --- modules ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, net", [
    (["--depth", "22", "--reduction", "0.6"], DenseNet(growthRate=5, depth=22, reduction=0.6)),
    (["--depth", "13", "--no-bottleneck"], DenseNet(growthRate=5, depth=13, bottleneck=False)),
])
def test_modules_shows_each_layer_with_its_channels(tmp_path, no_dot, flags, net):
    assert make_graph.main(["--growthRate", "5", "--out", str(tmp_path / "net.png"), *flags]) == 0
    nodes, edges = read_dot(tmp_path / "net.dot")
    layers = {f"{name}.{i}": layer for name, block in net.named_children() if name.startswith("dense")
              for i, layer in block.named_children()}
    others = {name for name, _ in net.named_children() if not name.startswith("dense")}
    assert nodes.keys() == {*layers, *(f"{name} cat" for name in layers), *others, "image", "Relu, Mean", "LogSoftmax"}
    for name, layer in layers.items():
        source, = (source for source, target in edges if target == name)  # one line carries all of its input
        assert shape(nodes[source])[0] == layer.bn1.num_features
        assert Counter(source for source, target in edges if target == f"{name} cat") == {source: 1, name: 1}
        assert re.findall(r"→(\d+)", nodes[name]) == [
            str(m.out_channels) for m in layer.modules() if isinstance(m, nn.Conv2d)]
        block, i = name.split(".")
        size = {"dense1": 32, "dense2": 16, "dense3": 8}[block]
        assert shape(nodes[f"{name} cat"]) == [layer.bn1.num_features + 5, size, size]
        assert source == ({"dense1": "conv1", "dense2": "trans1", "dense3": "trans2"}[block] if i == "0"
                          else f"{block}.{int(i) - 1} cat")
    assert shape(nodes["trans1"]) == [net.trans1.conv1.out_channels, 16, 16]
    assert shape(nodes["Relu, Mean"]) == [net.fc.in_features]
    assert shape(nodes["image"]) == [3, 32, 32] and shape(nodes["LogSoftmax"]) == [10]
    assert_leads_to("LogSoftmax", nodes, edges)


# --- the picture of a block -------------------------------------------------------------------------------------

@pytest.mark.slow
def test_block_writes_a_picture_in_colour(tmp_path, no_dot):
    assert make_graph.main(["--graph", "block", "--growthRate", "4", "--out", str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["graph-block.png", "graph-block.svg"]
    pixels = imread(tmp_path / "graph-block.png")
    assert pixels.shape[:2] == (600, 1600)
    for colour in make_graph.COLOURS[:5]:
        drawn = np.abs(pixels[..., :3] - make_graph.to_rgb(colour)).max(2) < 0.01
        assert drawn.sum() > 500, colour
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == 1).all(), "cut off"
    assert ElementTree.parse(tmp_path / "graph-block.svg").getroot().tag.endswith("svg")
    svg = (tmp_path / "graph-block.svg").read_bytes()
    make_graph.main(["--graph", "block", "--growthRate", "4", "--out", str(tmp_path)])
    assert (tmp_path / "graph-block.svg").read_bytes() == svg, "differs from run to run"


@pytest.mark.slow
@pytest.mark.parametrize("layers, k", [(3, 12), (5, 4), (8, 4096)])
def test_block_shows_an_arc_for_every_connection_and_the_right_numbers(layers, k):
    flags = ["--graph", "block", "--layers", str(layers), "--growthRate", str(k)]
    with matplotlib.style.context(make_graph.STYLE, after_reset=True):
        figure = make_graph.draw_block(make_graph.make_net(make_graph.get_args_parser().parse_args(flags)))
    arcs = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)
            and patch.get_linewidth() == 2.6]
    assert len(arcs) == layers * (layers + 1) // 2
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [t for t in texts if re.fullmatch(r"\$x_\{\d\}\$", t)] == [f"$x_{{{i}}}$" for i in range(layers)]
    assert [t for t in texts if t.startswith("$H_{")] == [f"$H_{{{i}}}$" for i in range(1, layers)]
    reads = [2 * k + i * k for i in range(layers)]
    assert [t for t in texts if " → " in t] == [*(f"{c} → {k}" for c in reads[:-1]), f"{reads[-1]} → {reads[-1] // 2}"]
    with matplotlib.style.context(make_graph.STYLE, after_reset=True):
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1 and box.y0 > 0 for box in boxes)


# --- Graphviz ---------------------------------------------------------------------------------------------------

def test_without_graphviz_only_the_dot_file_is_written_and_a_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'graph-modules.dot'}\n"
    assert len(err.splitlines()) == 1 and "install graphviz" in err
    assert os.listdir(tmp_path) == ["graph-modules.dot"]


@needs_dot
@pytest.mark.parametrize("graph", ["modules", "autograd"])
def test_graphviz_draws_every_node_and_edge_of_the_dot_file(tmp_path, capsys, graph):
    assert make_graph.main(["--graph", graph, "--depth", "10", "--out", str(tmp_path / "net")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"net.{suffix}") for suffix in ("dot", "svg", "png")]
    nodes, edges = read_dot(tmp_path / "net.dot")
    groups = [g.get("class") for g in ElementTree.parse(tmp_path / "net.svg").iter("{http://www.w3.org/2000/svg}g")]
    assert (groups.count("node"), groups.count("edge")) == (len(nodes), len(edges))
    assert imread(tmp_path / "net.png").std() > 0


@pytest.mark.parametrize("script, reason", [
    ("#!/bin/sh\necho 'no such plugin' >&2\nexit 3\n", "dot failed for the .svg with status 3 (no such plugin)"),
    ("#!/bin/sh\nexec /bin/sleep 30\n", "dot took more than 0.2 s"),
    ("no program\n", "dot cannot be run"),
])
def test_a_failure_of_dot_is_reported_in_one_line(tmp_path, monkeypatch, capsys, script, reason):
    fake_dot(tmp_path / "bin", monkeypatch, script)
    monkeypatch.setattr(make_graph, "DOT_SECONDS", 0.2 if "sleep" in script else 60)
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and reason in error
    assert sorted(os.listdir(tmp_path)) == ["bin", "graph-modules.dot"]


def test_quotes_and_newlines_are_escaped():
    assert make_graph.statement('a "b"\\', label="c\nd") == r'"a \"b\"\\" [label="c\nd"];'


# --- errors -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, parts", [
    (["--depth", "11"], ["depth is 11", "10 and 16"]),
    (["--depth", "11", "--no-bottleneck"], ["depth is 11", "10 and 13"]),
    (["--depth", "x"], ["'x'", "1 to 4096"]),
    (["--growthRate", "0"], ["'0'", "1 to 4096"]),
    (["--reduction", "0"], ["'0'", "above 0 and at most 1"]),
    (["--reduction", "nan"], ["'nan'", "above 0 and at most 1"]),
    (["--reduction", "0.001"], ["reduction is 0.001"]),
    (["--graph", "blocks"], ["'blocks'", "autograd", "modules", "block"]),
    (["--graph", "block", "--layers", "9"], ["'9'", "3 to 8"]),
    (["--efficient", "max"], ["'max'", "no", "yes"]),
    (["--out", "missing/"], ["missing/", "no directory missing"]),
    (["--out", "missing/net"], ["missing/net", "no directory missing"]),
    (["--out", ""], ["''", "printable characters"]),
    (["--out", "\x1b[31mred"], [r"'\x1b[31mred'", "printable characters"]),
    (["--colour", "red"], ["--colour"]),
])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, flags, parts):
    monkeypatch.chdir(tmp_path)
    error = refused(make_graph.main, capsys, *flags)
    for part in parts:
        assert part in error
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_script_exits_with_status_2_on_bad_input():
    done = run_script("make_graph.py", "--depth", "12")
    assert done.returncode == 2 and done.stdout == ""
    one_line(done.stderr, "make_graph.py: error: ")


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "no permission" in refused(make_graph.main, capsys, "--depth", 10, "--out", tmp_path)


@pytest.mark.parametrize("graph", ["modules", "block"])
def test_a_write_error_is_reported_in_one_line_and_keeps_the_old_file(tmp_path, capsys, graph):
    old = tmp_path / ("graph-modules.dot" if graph == "modules" else "graph-block.svg")
    old.write_text("old")
    with full_disk():
        assert make_graph.main(["--graph", graph, "--depth", "10", "--out", str(tmp_path)]) == 1
    error = one_line(capsys.readouterr().err, "make_graph.py: error: ")
    assert "File too large" in error and str(old) in error
    assert os.listdir(tmp_path) == [old.name] and old.read_text() == "old"


def test_a_directory_with_the_name_of_the_file_is_reported_in_one_line(tmp_path, no_dot, capsys):
    (tmp_path / "net.dot").mkdir()
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path / "net")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        make_graph.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("--graph", "--growthRate", "--depth", "--reduction", "--no-bottleneck", "--efficient", "--layers",
                 "--checkpoint", "--untrained", "--out"):
        assert flag in text
