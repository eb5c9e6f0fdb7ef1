"""make_graph.py --graph reuse: the maps' numbers, the drawing, and what is refused."""

import math
import os
import xml.etree.ElementTree as ElementTree

import matplotlib.style
import numpy as np
import pytest
import torch
from common import SMALL
from matplotlib.image import imread

import make_graph
import train
from densenet import DenseNet
from lib import reuse


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory, one_thread) -> str:
    """BC 10-4 after an epoch at a learning rate that is too small to change the initial weights by more than 1e-9."""
    save = tmp_path_factory.mktemp("run") / "run"
    assert train.main([*SMALL, "--nEpochs", "1", "--lr", "1e-12", "--seed", "7", "--data", images,
                       "--save", str(save)]) == 0
    return str(save / "latest.pth")


def altered(checkpoint: str, path, change) -> str:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, path)
    return str(path)


def targets(net: DenseNet):
    """-> for each block, a list of its targets: (batch norm, the convolution or classifier that follows it)"""
    for b in range(1, net.nBlocks + 1):
        block = [(layer.bn1, layer.conv1) for layer in getattr(net, f"dense{b}")]
        last = b == net.nBlocks
        after = net if last else getattr(net, f"trans{b}")
        yield [*block, (after.bn1, net.fc if last else after.conv1)]


def assert_nan_below_diagonal(values: torch.Tensor) -> None:
    n = len(values)
    assert values.isnan().equal(torch.ones(n, n).tril(-1).bool())


# --- the numbers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bottleneck", [True, False])
def test_maps_show_the_weights_that_each_source_was_given(bottleneck):
    k, c = 3, 7
    net = DenseNet(k, blockConfig=[2, 4, 1], initChannels=c, nClasses=5, bottleneck=bottleneck)
    expected = []
    with torch.no_grad():
        for readers in targets(net):
            n = len(readers)
            weights, scaled = np.full((n, n), math.nan), np.full((n, n), math.nan)
            for column, (norm, reader) in enumerate(readers):
                for source in range(column + 1):
                    channels = slice(0, c) if source == 0 else slice(c + (source - 1) * k, c + source * k)
                    w, gamma = 0.1 * (1 + (3 * source + column) % 5), 0.5 * (1 + (source + 2 * column) % 3)
                    signs = torch.randn_like(reader.weight[:, channels]).sign()
                    reader.weight[:, channels] = w * signs
                    norm.weight[channels] = gamma * signs[0].flatten(1)[:, 0] if signs.dim() == 4 else -gamma
                    weights[source, column], scaled[source, column] = w, gamma * w
            expected.append((weights / np.nanmax(weights, 0), scaled / np.nanmax(scaled, 0)))
            c = (c + k * (n - 1)) // 2
    maps = reuse.reuse_maps(net)
    assert [block.follower for block in maps] == ["trans1", "trans2", "fc"]
    assert [len(block.weights) for block in maps] == [3, 5, 2]
    for block, (weights, scaled) in zip(maps, expected, strict=True):
        np.testing.assert_allclose(block.weights, weights, rtol=1e-6)
        np.testing.assert_allclose(block.scaled_weights, scaled, rtol=1e-6)
        assert_nan_below_diagonal(block.weights)
        assert_nan_below_diagonal(block.scaled_weights)


def test_a_cell_is_the_mean_over_all_weights_of_its_source():
    torch.manual_seed(0)
    net = DenseNet(4, 16)
    with torch.no_grad():
        for norm, _ in next(targets(net)):
            norm.weight.normal_()
    maps = reuse.reuse_maps(net)[0]
    layer = net.dense1[1]  # reads 8 channels of the input and 4 of layer 1
    w, gamma = layer.conv1.weight.detach()[:, :, 0, 0].double().numpy(), layer.bn1.weight.detach().double().numpy()
    for values, expected in ((maps.weights, np.abs(w)), (maps.scaled_weights, np.abs(gamma * w))):
        means = np.array([expected[:, :8].mean(), expected[:, 8:].mean()])
        np.testing.assert_allclose(values[:2, 1], means / means.max(), rtol=1e-12)


def test_the_second_convolution_of_a_bottleneck_has_no_effect_on_the_maps():
    net = DenseNet(4, 10)
    before = reuse.reuse_maps(net)[0].weights
    with torch.no_grad():
        net.dense1[0].conv2.weight.fill_(9)
        net.dense1[0].bn2.weight.fill_(9)
    torch.testing.assert_close(reuse.reuse_maps(net)[0].weights, before, equal_nan=True, rtol=0, atol=0)


def test_a_target_whose_weights_are_zero_is_a_column_of_zeros():
    net = DenseNet(4, 10)
    torch.nn.init.zeros_(net.fc.weight)
    assert reuse.reuse_maps(net)[-1].weights[:, -1].tolist() == [0, 0]


def test_untrained_gives_the_initial_weights_of_the_run(checkpoint):
    trained, which = reuse.load_network(checkpoint, False, {})
    first, which_first = reuse.load_network(checkpoint, True, {})
    assert (which, which_first) == ("after epoch 1", "before training (seed 7)")
    for name, weight in trained.named_parameters():
        if weight.dim() > 1:  # batch norm's parameters are 1 and 0 with any seed
            torch.testing.assert_close(weight, first.get_parameter(name), rtol=0, atol=1e-9)


# --- the drawing ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_figure_is_written_as_svg_and_png_and_nothing_is_cut_off(tmp_path, checkpoint, capsys):
    flags = ["--graph", "reuse", "--checkpoint", checkpoint, "--out", str(tmp_path)]
    assert make_graph.main(flags) == 0
    assert capsys.readouterr() == (f"{tmp_path}/graph-reuse.svg\n{tmp_path}/graph-reuse.png\n", "")
    pixels = imread(tmp_path / "graph-reuse.png")[..., :3]
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == 1).all(), "cut off"
    darkest = np.array(reuse.CMAP(1.0)[:3])
    assert (np.abs(pixels - darkest).max(2) < 0.02).mean() > 0.02
    assert ElementTree.parse(tmp_path / "graph-reuse.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
def test_a_second_call_writes_the_same_bytes_and_untrained_writes_other_files(tmp_path, checkpoint):
    flags = ["--graph", "reuse", "--checkpoint", checkpoint, "--out", str(tmp_path)]
    assert make_graph.main(flags) == 0
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert make_graph.main([*flags, "--growthRate", "4", "--depth", "10", "--reduction", "0.5"]) == 0
    assert make_graph.main([*flags, "--untrained"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["graph-reuse-untrained.png", "graph-reuse-untrained.svg", *sorted(files)]
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[1, 1], [2, 6, 4], [9, 16], [6, 12, 48, 32]])
def test_each_block_has_a_panel_with_axes_and_labels(layers):
    maps = reuse.reuse_maps(DenseNet(2, blockConfig=layers))
    with matplotlib.style.context(make_graph.STYLE, after_reset=True):
        figure = reuse.draw_reuse(maps, "a title")
        figure.draw_without_rendering()
        panels = np.array(figure.axes[:-1]).reshape(2, len(layers))
        assert [axes.get_title() for axes in panels[0]] == [f"Dense block {b + 1}" for b in range(len(layers))]
        assert all("Source layer $s$" in axes.get_ylabel() for axes in panels[:, 0])
        assert "|w|" in panels[0, 0].get_ylabel() and r"|\gamma w|" in panels[1, 0].get_ylabel()
        assert all(axes.get_xlabel() == r"Target layer $\ell$" for axes in panels[1])
        for axes, n, block in zip(panels[0], layers, maps, strict=True):
            assert axes.get_xlim() == (0, n + 1) and axes.get_ylim() == (n + 1, 0)  # the input is above
            names = [text.get_text() for text in axes.get_xticklabels()]
            assert names[-1] == block.follower
            for name, position in list(zip(names, axes.get_xticks(), strict=True))[:-1]:
                assert position == int(name) - 0.5
            names = [text.get_text() for text in axes.get_yticklabels()]
            assert names[0] == "input" and axes.get_yticks()[0] == 0.5
            for name, position in list(zip(names, axes.get_yticks(), strict=True))[1:]:
                assert position == int(name) + 0.5
            drawn = axes.collections[0].get_array()
            np.testing.assert_array_equal(np.ma.filled(drawn, math.nan), block.weights)
            assert drawn.mask.sum() == n * (n + 1) // 2, "cells without a connection are blank"
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                boxes = [text.get_window_extent() for text in labels]
                assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# --- refusals ---------------------------------------------------------------------------------------------------

def refused(tmp_path, capsys, *flags: str) -> str:
    (tmp_path / "out").mkdir()
    assert make_graph.main([*flags, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), os.listdir(tmp_path / "out")) == ("", 1, [])
    return err


@pytest.mark.parametrize("flags, message", [
    (["--depth", "100"], "--depth 100 contradicts the checkpoint, whose depth is 10"),  # 100 is the default, too
    (["--growthRate", "12"], "--growthRate 12 contradicts the checkpoint, whose growthRate is 4"),
    (["--reduction", "1"], "--reduction 1.0 contradicts the checkpoint, whose reduction is 0.5"),
    (["--no-bottleneck"], "--no-bottleneck contradicts the checkpoint"),
])
def test_flags_that_contradict_the_checkpoint_are_refused(tmp_path, checkpoint, capsys, flags, message):
    assert message in refused(tmp_path, capsys, "--graph", "reuse", "--checkpoint", checkpoint, *flags)


@pytest.mark.parametrize("graph", ["modules", "autograd", "block"])
@pytest.mark.parametrize("flags", [["--checkpoint", "latest.pth"], ["--untrained"]])
def test_flags_of_reuse_are_refused_for_other_graphs(tmp_path, capsys, graph, flags):
    assert f"{flags[0]} belongs to --graph reuse" in refused(tmp_path, capsys, "--graph", graph, *flags)


@pytest.mark.parametrize("flags", [[], ["--untrained"]])
def test_a_missing_checkpoint_is_refused(tmp_path, capsys, flags):
    assert "give --checkpoint FILE" in refused(tmp_path, capsys, "--graph", "reuse", *flags)


def test_a_file_that_is_missing_or_not_a_checkpoint_is_refused(tmp_path, capsys):
    missing = str(tmp_path / "none.pth")
    assert f"{missing}: cannot be read (No such file" in refused(tmp_path, capsys, "--graph", "reuse",
                                                                 "--checkpoint", missing)
    (tmp_path / "out").rmdir()
    (tmp_path / "text.pth").write_text("text")
    assert "not a checkpoint" in refused(tmp_path, capsys, "--graph", "reuse",
                                         "--checkpoint", str(tmp_path / "text.pth"))


@pytest.mark.parametrize("change, message", [
    (lambda content: content["flags"].update(seed="7"), "its seed is '7'"),
    (lambda content: content.update(flags=[]), "its seed is None"),
    (lambda content: content.update(epoch=-1), "its epoch is -1"),
    (lambda content: content["model"]["fc.weight"].fill_(math.nan), "weights in dense3 or fc are not finite"),
])
def test_a_checkpoint_with_impossible_values_is_refused(tmp_path, checkpoint, capsys, change, message):
    path = altered(checkpoint, tmp_path / "altered.pth", change)
    assert message in refused(tmp_path, capsys, "--graph", "reuse", "--checkpoint", path)
