"""make_graph.py: the .dot files hold the real network, the pictures are right, errors are one line."""

import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import torch.nn as nn
from common import full_disk, one_line, run_script
from matplotlib.image import imread
from matplotlib.patches import FancyArrowPatch

import make_graph
from densenet import DenseNet
from lib.figures import style

refused = partial(common.refused, make_graph.main)


@pytest.fixture
def no_dot(monkeypatch):
    monkeypatch.setenv("PATH", "")


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


def draw(folder: Path, *flags: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """-> nodes and edges of a graph of --growthRate 4"""
    assert make_graph.main(["--growthRate", "4", "--out", str(folder / "net.png"), *flags]) == 0
    return read_dot(folder / "net.dot")


def shape(label: str) -> list[int]:
    """The numbers of a label's last line."""
    return [int(number) for number in re.findall(r"\d+", label.split("\\n")[-1])]


# --- autograd and modules ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, net", [
    (["--depth", "16"], DenseNet(growthRate=4, depth=16)),
    (["--depth", "10", "--no-bottleneck", "--reduction", "1"], DenseNet(4, 10, reduction=1, bottleneck=False)),
])
def test_autograd_shows_each_operation_and_parameter_once(tmp_path, no_dot, flags, net):
    nodes, edges = draw(tmp_path, "--graph", "autograd", *flags)
    leaves = {name: label for name, label in nodes.items() if not name.startswith("operation")}
    assert leaves == {name: f"{name}\\n{tuple(p.shape)}" for name, p in net.named_parameters()} | {
        "image": "image\\n(1, 3, 32, 32)", "output": "output\\n(1, 10)"}
    kinds = Counter(re.sub(r"\d+$", "", label) for name, label in nodes.items() if name not in leaves)
    modules = Counter(type(m) for m in net.modules())
    assert kinds["ConvolutionBackward"] == modules[nn.Conv2d]
    assert kinds["NativeBatchNormBackward"] == kinds["ReluBackward"] == modules[nn.BatchNorm2d]
    assert kinds["CatBackward"] == sum(len(block) for block in (net.dense1, net.dense2, net.dense3))
    assert Counter(source for source, _ in edges if source in leaves) == dict.fromkeys(leaves.keys() - {"output"}, 1)
    target = dict(edges)  # of a leaf: it has one edge
    assert nodes[target["dense2.0.conv1.weight"]] == "ConvolutionBackward0"


def test_the_efficient_block_is_one_operation(tmp_path, no_dot):
    nodes, _ = draw(tmp_path, "--graph", "autograd", "--depth", "16", "--efficient", "yes")
    assert list(nodes.values()).count("EfficientBlockBackward") == 3 and "CatBackward0" not in nodes.values()
    assert nodes.keys() >= {name for name, _ in DenseNet(4, 16).named_parameters()}


@pytest.mark.parametrize("flags, net", [
    (["--depth", "22", "--reduction", "0.6"], DenseNet(growthRate=4, depth=22, reduction=0.6)),
    (["--depth", "13", "--no-bottleneck"], DenseNet(growthRate=4, depth=13, bottleneck=False)),
])
def test_modules_shows_each_layer_with_its_channels(tmp_path, no_dot, flags, net):
    nodes, edges = draw(tmp_path, *flags)
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
        assert shape(nodes[f"{name} cat"]) == [layer.bn1.num_features + 4, size, size]
        assert source == ({"dense1": "conv1", "dense2": "trans1", "dense3": "trans2"}[block] if i == "0"
                          else f"{block}.{int(i) - 1} cat")
    assert shape(nodes["trans1"]) == [net.trans1.conv1.out_channels, 16, 16]
    assert shape(nodes["Relu, Mean"]) == [net.fc.in_features]
    assert shape(nodes["image"]) == [3, 32, 32] and shape(nodes["LogSoftmax"]) == [10]


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
@pytest.mark.parametrize("graph", ["modules", "autograd"])
def test_graphviz_draws_every_node_and_edge(tmp_path, capsys, graph):
    nodes, edges = draw(tmp_path, "--graph", graph, "--depth", "10")
    assert capsys.readouterr().out.split() == [str(tmp_path / f"net.{suffix}") for suffix in ("dot", "svg", "png")]
    groups = [g.get("class") for g in ElementTree.parse(tmp_path / "net.svg").iter("{http://www.w3.org/2000/svg}g")]
    assert (groups.count("node"), groups.count("edge")) == (len(nodes), len(edges))
    assert imread(tmp_path / "net.png").std() > 0


def test_without_graphviz_only_the_dot_file_is_written_and_a_line_says_so(tmp_path, capsys, no_dot):
    draw(tmp_path, "--depth", "10")
    assert "install graphviz" in one_line(capsys.readouterr().err, "make_graph.py: ")
    assert os.listdir(tmp_path) == ["net.dot"]


# --- block ------------------------------------------------------------------------------------------------------

def picture_of(file: Path) -> np.ndarray:
    """-> its pixels; nothing may be cut off"""
    pixels = imread(file)[..., :3]
    assert all((side == 1).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return pixels


def test_block_writes_a_picture_in_colour(tmp_path):
    assert make_graph.main(["--graph", "block", "--growthRate", "4", "--out", str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["graph-block.png", "graph-block.svg"]
    pixels = picture_of(tmp_path / "graph-block.png")
    for colour in make_graph.COLOURS[:5]:
        assert (np.abs(pixels - make_graph.to_rgb(colour)).max(2) < 0.01).sum() > 500, colour


@pytest.mark.parametrize("layers, k, numbers", [
    (3, 12, ["24 → 12", "36 → 12", "48 → 24"]),
    (4, 4096, ["8192 → 4096", "12288 → 4096", "16384 → 4096", "20480 → 10240"])])
def test_block_shows_an_arc_for_every_connection_and_the_right_numbers(layers, k, numbers):
    flags = ["--graph", "block", "--layers", str(layers), "--growthRate", str(k)]
    net, _ = make_graph.load(make_graph.parse_args(flags))
    with style(make_graph.STYLE):
        axes = make_graph.draw_block(net).axes[0]
        arcs = [p for p in axes.patches if isinstance(p, FancyArrowPatch) and p.get_linewidth() == 2.6]
        boxes = [text.get_window_extent() for text in axes.texts]
    assert len(arcs) == layers * (layers + 1) // 2
    assert [text.get_text() for text in axes.texts if " → " in text.get_text()] == numbers
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# --- reuse ------------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path) -> str:
    """A network of seed 7 whose convolutions were then doubled."""
    torch.manual_seed(7)
    net = DenseNet(4, 10, nClasses=2)
    weights = {name: 2 * value if value.dim() == 4 else value for name, value in net.state_dict().items()}
    torch.save({"format": 1, "arguments": net.arguments, "model": weights, "mean": [0.5] * 3, "std": [0.2] * 3,
                "classes": ["a", "b"], "flags": {"seed": 7}, "epoch": 3}, tmp_path / "latest.pth")
    return str(tmp_path / "latest.pth")


@pytest.mark.parametrize("bottleneck", [True, False])
def test_reuse_shows_the_weights_that_each_source_was_given(bottleneck):
    k, c = 3, 7
    net = DenseNet(k, blockConfig=[2, 4, 1], initChannels=c, nClasses=5, bottleneck=bottleneck)
    blocks = make_graph.readers_of(net)
    assert {follower: len(readers) for follower, readers in blocks.items()} == {"trans1": 3, "trans2": 5, "fc": 2}
    for readers in blocks.values():
        n = len(readers)
        expected = np.full((2, n, n), math.nan)
        for column, (norm, reader) in enumerate(readers):
            for source in range(column + 1):
                channels = slice(0, c) if source == 0 else slice(c + (source - 1) * k, c + source * k)
                w, gamma = 0.1 * (1 + (3 * source + column) % 5), 0.5 * (1 + (source + 2 * column) % 3)
                with torch.no_grad():
                    reader.weight[:, channels] = w * torch.randn_like(reader.weight[:, channels]).sign()
                    norm.weight[channels] = -gamma
                expected[:, source, column] = w, gamma * w
        expected /= np.nanmax(expected, 1, keepdims=True)
        for with_gamma in (False, True):
            np.testing.assert_allclose(make_graph.reuse_map(readers, with_gamma), expected[int(with_gamma)], rtol=1e-6)
        c = (c + k * (n - 1)) // 2


def test_untrained_is_the_network_before_its_first_epoch(checkpoint):
    flags = ["--graph", "reuse", "--checkpoint", checkpoint]
    trained, title = make_graph.load(make_graph.parse_args(flags))
    first, first_title = make_graph.load(make_graph.parse_args([*flags, "--untrained"]))
    assert title == "DenseNet-BC, L=10, k=4, 2,586 parameters, after epoch 3"
    assert first_title == "DenseNet-BC, L=10, k=4, 2,586 parameters, before training (seed 7)"
    assert torch.equal(trained.dense2[0].conv2.weight, 2 * first.dense2[0].conv2.weight)


def test_reuse_writes_two_files_and_those_of_untrained_beside_them(tmp_path, checkpoint, capsys):
    for flags in ([], ["--untrained"]):
        assert make_graph.main(["--graph", "reuse", "--checkpoint", checkpoint, "--out", str(tmp_path), *flags]) == 0
        stem = f"{tmp_path}/graph-reuse" + "-untrained" * bool(flags)
        assert capsys.readouterr() == (f"{stem}.png\n{stem}.svg\n", "")
        pixels = picture_of(Path(f"{stem}.png"))
        assert (np.abs(pixels - make_graph.CMAP(1.0)[:3]).max(2) < 0.02).mean() > 0.02


def test_each_block_has_a_panel_with_its_map_and_labels():
    layers = [2, 6, 48]
    net = DenseNet(2, blockConfig=layers)
    with style(make_graph.STYLE):
        figure = make_graph.draw_reuse(net, "a title")
        figure.draw_without_rendering()
    for axes, n, (follower, readers) in zip(figure.axes[:3], layers, make_graph.readers_of(net).items(), strict=True):
        assert axes.get_xlim() == (0, n + 1) and axes.get_ylim() == (n + 1, 0)  # the input is above
        *names, last = (text.get_text() for text in axes.get_xticklabels())
        assert last == follower and [int(name) - 0.5 for name in names] == axes.get_xticks()[:-1].tolist()
        first, *names = (text.get_text() for text in axes.get_yticklabels())
        assert first == "input" and [int(name) + 0.5 for name in names] == axes.get_yticks()[1:].tolist()
        drawn = np.ma.filled(axes.collections[0].get_array(), math.nan)
        np.testing.assert_array_equal(drawn, make_graph.reuse_map(readers, False))


# --- errors -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, part", [
    (["--depth", "11"], "nearest 10 and 16"), (["--depth", "x"], "'x'"), (["--reduction", "0.001"], "reduction is"),
    (["--graph", "blocks"], "'autograd', 'modules', 'block', 'reuse'"), (["--layers", "9"], "3 to 8"),
    (["--efficient", "max"], "'max'"), (["--out", "missing/net"], "missing is no directory"),
    (["--colour", "red"], "--colour"),
    (["--checkpoint", __file__], "--checkpoint belongs to --graph reuse"),
    (["--graph", "block", "--untrained"], "--untrained belongs to --graph reuse"),
    (["--graph", "reuse", "--untrained"], "give --checkpoint FILE"),
    (["--graph", "reuse", "--checkpoint", __file__, "--depth", "100"], "--depth contradicts"),
    (["--graph", "reuse", "--checkpoint", "none.pth"], "none.pth"),
    (["--graph", "reuse", "--checkpoint", __file__], "test_make_graph.py")])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, *flags)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("graph", ["modules", "block"])
def test_a_write_error_is_reported_in_one_line(tmp_path, capsys, graph):
    with full_disk():
        assert make_graph.main(["--graph", graph, "--depth", "10", "--out", str(tmp_path)]) == 1
    assert "File too large" in one_line(capsys.readouterr().err, "make_graph.py: error: ")


def test_a_failure_of_dot_is_reported_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "dot").write_text("#!/bin/sh\necho 'no such plugin' >&2\nexit 3\n")
    (tmp_path / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path)]) == 1
    assert "(no such plugin)" in one_line(capsys.readouterr().err, "make_graph.py: error: ")


@pytest.mark.parametrize("script", ["make_graph.py", "compare_grads.py", "numcheck.py"])
def test_no_value_of_mplbackend_matters(script):
    assert run_script(script, "--help", MPLBACKEND="nonsense").returncode == 0
