"""make_graph.py: the .dot files hold the real network, the pictures are right, errors are one line."""

import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import full_disk, one_line, refused, run_script
from matplotlib.image import imread

import make_graph
from densenet import Bottleneck, DenseNet


@pytest.fixture
def no_dot(monkeypatch):
    monkeypatch.setenv("PATH", "")


def draw(folder: Path, *flags: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Draws a graph of --growthRate 4 -> the label of each node of its .dot file, the edges"""
    assert make_graph.main(["--growthRate", "4", "--out", str(folder / "net.png"), *flags]) == 0
    nodes, edges = {}, []
    for text in (folder / "net.dot").read_text().splitlines():
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


# --- autograd and modules ---------------------------------------------------------------------------------------

def test_autograd_shows_each_operation_and_parameter_once(tmp_path, no_dot):
    nodes, edges = draw(tmp_path, "--graph", "autograd", "--depth", "16")  # two layers a block
    leaves = {name: label for name, label in nodes.items() if not name.startswith("operation")}
    assert leaves == {name: f"{name}\\n{tuple(p.shape)}" for name, p in DenseNet(4, 16).named_parameters()} | {
        "image": "image\\n(1, 3, 32, 32)", "output": "output\\n(1, 10)"}
    kinds = Counter(re.sub(r"\d+$", "", label) for name, label in nodes.items() if name not in leaves)
    assert kinds["ConvolutionBackward"] == kinds["NativeBatchNormBackward"] == kinds["ReluBackward"] == 15
    assert kinds["CatBackward"] == 6
    assert Counter(source for source, _ in edges if source in leaves) == dict.fromkeys(leaves.keys() - {"output"}, 1)
    target = dict(edges)  # of a leaf: it has one edge
    assert nodes[target["dense2.0.conv1.weight"]] == "ConvolutionBackward0"


def test_the_efficient_block_is_one_operation(tmp_path, no_dot):
    nodes, _ = draw(tmp_path, "--graph", "autograd", "--depth", "16", "--efficient", "yes")
    assert list(nodes.values()).count("EfficientBlockBackward") == 3 and "CatBackward0" not in nodes.values()
    assert nodes.keys() >= {name for name, _ in DenseNet(4, 16).named_parameters()}


def test_modules_shows_each_layer_with_its_channels(tmp_path, no_dot):
    nodes, edges = draw(tmp_path, "--depth", "22", "--reduction", "0.6")  # three layers a block
    net = DenseNet(4, 22, reduction=0.6)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, Bottleneck)}
    assert nodes.keys() == {*layers, *(f"{name} cat" for name in layers), "image", "conv1", "trans1", "trans2", "bn1",
                            "Relu, Mean", "fc", "LogSoftmax"}
    joint = ""
    for name, layer in layers.items():
        source, = (source for source, target in edges if target == name)  # one line carries all of its input
        assert source == {"dense1.0": "conv1", "dense2.0": "trans1", "dense3.0": "trans2"}.get(name, joint)
        assert shape(nodes[source])[0] == layer.bn1.num_features
        assert re.findall(r"→(\d+)", nodes[name]) == ["16", "4"]
        joint = f"{name} cat"
        assert sorted(source for source, target in edges if target == joint) == sorted([source, name])
        size = {"dense1": 32, "dense2": 16, "dense3": 8}[name.partition(".")[0]]
        assert shape(nodes[joint]) == [layer.bn1.num_features + 4, size, size]
    assert {("image", "conv1"), ("dense1.2 cat", "trans1"), ("dense2.2 cat", "trans2"), ("dense3.2 cat", "bn1"),
            ("bn1", "Relu, Mean"), ("Relu, Mean", "fc"), ("fc", "LogSoftmax")} <= {*edges}
    assert shape(nodes["image"]) == [3, 32, 32] and shape(nodes["trans1"]) == [net.trans1.conv1.out_channels, 16, 16]
    assert shape(nodes["Relu, Mean"]) == [net.fc.in_features] and shape(nodes["LogSoftmax"]) == [10]


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
@pytest.mark.parametrize("graph", ["modules", "autograd"])
def test_graphviz_draws_every_node_and_edge(tmp_path, capsys, graph):
    nodes, edges = draw(tmp_path, "--graph", graph, "--depth", "10")
    assert capsys.readouterr().out.split() == [str(tmp_path / f"net.{suffix}") for suffix in ("dot", "svg", "png")]
    drawn = (tmp_path / "net.svg").read_text()
    assert (drawn.count('class="node"'), drawn.count('class="edge"')) == (len(nodes), len(edges))
    assert imread(tmp_path / "net.png").std() > 0


def test_without_graphviz_only_the_dot_file_is_written_and_a_line_says_so(tmp_path, capsys, no_dot):
    draw(tmp_path, "--depth", "10")
    assert "install graphviz" in one_line(capsys.readouterr().err, "make_graph.py: ")
    assert os.listdir(tmp_path) == ["net.dot"]


# --- block and reuse --------------------------------------------------------------------------------------------

def test_block_shows_in_colour_an_arc_for_every_connection_and_the_right_numbers(tmp_path):
    flags = ["--graph", "block", "--layers", "4", "--growthRate", "12", "--out", str(tmp_path)]
    assert make_graph.main(flags) == 0
    assert sorted(os.listdir(tmp_path)) == ["graph-block.png", "graph-block.svg"]
    drawn = (tmp_path / "graph-block.svg").read_text()
    assert re.findall(r"<!-- (\d+ → \d+) -->", drawn) == ["24 → 12", "36 → 12", "48 → 12", "60 → 30"]
    assert drawn.count("stroke-width: 2.6") == 2 * (1 + 2 + 3 + 4)  # line and head
    pixels = imread(tmp_path / "graph-block.png")[..., :3]
    assert all((side == 1).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))  # nothing is cut off
    for colour in make_graph.COLOURS[:4]:
        assert (np.abs(pixels - make_graph.to_rgb(colour)).max(2) < 0.01).sum() > 500, colour


def test_no_texts_of_block_overlap_however_large_the_growth_rate():
    net, _ = make_graph.load(make_graph.parse_args(["--graph", "block", "--layers", "3", "--growthRate", "4096"]))
    boxes = [text.get_window_extent() for text in make_graph.draw_block(net).axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_reuse_shows_the_weights_that_each_source_was_given():
    k, c = 3, 7
    net = DenseNet(k, blockConfig=[12, 2], initChannels=c, nClasses=5)
    expected = []
    for readers in make_graph.readers_of(net).values():
        n = len(readers)
        values = np.full((2, n, n), math.nan)
        for column, (norm, reader) in enumerate(readers):
            for source in range(column + 1):
                channels = slice(0, c) if source == 0 else slice(c + (source - 1) * k, c + source * k)
                w, gamma = 0.1 * (1 + (3 * source + column) % 5), 0.5 * (1 + (source + 2 * column) % 3)
                with torch.no_grad():
                    reader.weight[:, channels] = w * torch.randn_like(reader.weight[:, channels]).sign()
                    norm.weight[channels] = -gamma
                values[:, source, column] = w, gamma * w
        expected.append(values / np.nanmax(values, 1, keepdims=True))
        c = (c + k * (n - 1)) // 2
    panels = make_graph.draw_reuse(net, "a title").axes  # two above, by |w|, and two below, by |gamma w|
    for i, axes in enumerate(panels[:4]):
        values = expected[i % 2][i // 2]
        np.testing.assert_allclose(np.ma.filled(axes.collections[0].get_array(), math.nan), values, rtol=1e-6)
        assert axes.get_xlim() == (0, len(values)) and axes.get_ylim() == (len(values), 0)  # the input is above
        assert axes.get_xticklabels()[-1].get_text() == ("trans1", "fc")[i % 2]
    first = panels[0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["2", "4", "6", "8", "10", "trans1"]
    assert first.get_xticks().tolist() == [1.5, 3.5, 5.5, 7.5, 9.5, 12.5]
    assert [label.get_text() for label in first.get_yticklabels()] == ["input", "2", "4", "6", "8", "10", "12"]
    assert first.get_yticks().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5]


def test_untrained_draws_the_network_before_its_first_epoch_beside_the_trained_one(tmp_path, capsys):
    torch.manual_seed(7)
    net = DenseNet(4, 10, nClasses=2)
    weights = {name: 2 * value if value.dim() == 4 else value for name, value in net.state_dict().items()}
    torch.save({"format": 1, "arguments": net.arguments, "model": weights, "mean": [0.5] * 3, "std": [0.2] * 3,
                "classes": ["a", "b"], "flags": {"seed": 7}, "epoch": 3}, tmp_path / "latest.pth")
    common_flags = ["--graph", "reuse", "--checkpoint", str(tmp_path / "latest.pth"), "--out", str(tmp_path)]
    for flags, stem, factor, when in (([], "graph-reuse", 2, "after epoch 3"),
                                      (["--untrained"], "graph-reuse-untrained", 1, "before training (seed 7)")):
        assert make_graph.main([*common_flags, *flags]) == 0
        assert capsys.readouterr() == (f"{tmp_path}/{stem}.png\n{tmp_path}/{stem}.svg\n", "")
        drawn, title = make_graph.load(make_graph.parse_args([*common_flags, *flags]))
        assert title == f"DenseNet-BC, L=10, k=4, 2,586 parameters, {when}"
        assert f"<!-- {title} -->" in (tmp_path / f"{stem}.svg").read_text()
        assert torch.equal(drawn.dense2[0].conv2.weight, factor * net.dense2[0].conv2.weight)


# --- errors -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, part", [
    (["--depth", "11"], "nearest 10 and 16"), (["--layers", "9"], "3 to 8"),
    (["--out", "missing/net"], "missing is no directory"),
    (["--checkpoint", __file__], "--checkpoint belongs to --graph reuse"),
    (["--graph", "block", "--untrained"], "--untrained belongs to --graph reuse"),
    (["--graph", "reuse", "--untrained"], "give --checkpoint FILE"),
    (["--graph", "reuse", "--checkpoint", __file__, "--depth", "100"], "--depth contradicts"),
    (["--graph", "reuse", "--checkpoint", "none.pth"], "none.pth"),
    (["--graph", "reuse", "--checkpoint", __file__], "test_make_graph.py")])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    assert part in refused(make_graph.main, capsys, *flags)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_reported_in_one_line(tmp_path, capsys):
    with full_disk():
        assert make_graph.main(["--depth", "10", "--out", str(tmp_path)]) == 1
    assert "File too large" in one_line(capsys.readouterr().err, "make_graph.py: error: ")


def test_a_failure_of_dot_is_reported_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "dot").write_text("#!/bin/sh\necho 'no such plugin' >&2\nexit 3\n")
    (tmp_path / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path)]) == 1
    assert "(no such plugin)" in one_line(capsys.readouterr().err, "make_graph.py: error: ")


@pytest.mark.parametrize("script", ["make_graph.py", "compare_grads.py", "numcheck.py"])
def test_the_scripts_run_whatever_mplbackend_says(script):
    assert run_script(script, "--help", MPLBACKEND="nonsense").returncode == 0
