"""How much each layer of a DenseNet reads from the layers before it (paper, section 5, figure 5).

``reuse_maps`` computes one map for each dense block from the network's weights, ``draw_reuse`` draws the maps.
"""

from itertools import pairwise
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # without pyplot: no display needed
from matplotlib.patches import Rectangle

import densenet
from densenet import DenseNet

INK = "#333333"
CMAP = matplotlib.colormaps["YlGnBu"]
MAX_NUMBERED = 9  # rows of a map whose cells show numbers; the cells of larger maps are too small
MAX_TICKS = 9  # layer numbers along an axis
ROWS = {"weights": r"mean $|w|$, as in the paper", "scaled_weights": r"mean $|\gamma w|$, with batch norm's $\gamma$"}


class BlockMaps(NamedTuple):
    """The maps of a dense block with n layers, float64 of shape (n + 1, n + 1).

    A row is a source: row 0 the block's input, row s the output of layer s. A column is a target: column l - 1 layer l,
    which reads the sources 0 to l - 1, and the last column the module that follows the block. Cells without a
    connection are nan. The largest value of each column is 1.
    """

    follower: str  # the name of the module that follows the block: "trans1", ..., or "fc"
    weights: torch.Tensor  # mean |w|, as in the paper
    scaled_weights: torch.Tensor  # mean |gamma w|, with gamma of the batch norm in front of the weights


def reuse_maps(net: DenseNet) -> list[BlockMaps]:
    """The maps of the dense blocks, from first to last.

    A layer's weights are those of its first convolution: only that one reads the block's feature maps. The module that
    follows a block is the transition, with its 1x1 convolution, or the classifier after the last block.

    A ReLU is between gamma and the weight w: w relu(gamma x + beta) = |gamma| w relu(sign(gamma) x + beta / |gamma|).
    So |gamma w| is the weight of a normalised feature map x. The scale of |w| alone is arbitrary: doubling gamma and
    beta and halving w gives the same network.

    Raises:
        ValueError: if a weight is not finite.
    """
    maps = []
    for b in range(1, net.nBlocks + 1):
        is_last = b == net.nBlocks
        follower = "fc" if is_last else f"trans{b}"
        targets = [(layer.bn1, layer.conv1) for layer in net.get_submodule(f"dense{b}")]
        if is_last:
            targets.append((net.bn1, net.fc))
        else:
            transition = net.get_submodule(follower)
            targets.append((transition.bn1, transition.conv1))
        reads = [norm.num_features for norm, _ in targets]  # channels that each target reads
        sizes = [reads[0], *(after - before for before, after in pairwise(reads))]  # channels of each source
        weights = torch.full((len(targets), len(targets)), torch.nan, dtype=torch.float64)
        scaled = weights.clone()
        for i, (norm, reader) in enumerate(targets):
            w = reader.weight.detach().double().abs().transpose(0, 1).flatten(1).mean(1)  # (input channels,)
            gamma = norm.weight.detach().double().abs()
            if not (w.isfinite().all() and gamma.isfinite().all()):
                raise ValueError(f"weights in dense{b} or {follower} are not finite: the run has diverged")
            weights[:i + 1, i] = relative_means(w, sizes[:i + 1])
            scaled[:i + 1, i] = relative_means(gamma * w, sizes[:i + 1])
        maps.append(BlockMaps(follower, weights, scaled))
    return maps


def relative_means(values: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The mean over the channels of each source, divided by the largest mean; (sum of sizes,) -> (len(sizes),)."""
    means = torch.stack([part.mean() for part in values.split(sizes)])
    return means / means.max() if means.max() > 0 else means


def load_network(path: str | None, untrained: bool, explicit: dict[str, object]) -> tuple[DenseNet, str]:
    """-> the network of train.py's checkpoint, or with ``untrained`` its initial state; words that say which it is

    ``explicit`` holds only the flags that are on the command line, not the defaults.

    Raises:
        ValueError: if there is no path, if the file cannot be read, is damaged or not a checkpoint of train.py, or if
            an explicit flag contradicts the checkpoint.
    """
    if path is None:
        raise ValueError("--graph reuse needs a trained network; give --checkpoint FILE, the latest.pth of a run")
    try:
        net, checkpoint = densenet.load(path), densenet.read_checkpoint(path)
    except OSError as error:
        raise ValueError(f"--checkpoint {path}: cannot be read ({error.strerror})") from None
    for name in ("growthRate", "depth", "reduction"):
        if explicit.get(name, net.arguments[name]) != net.arguments[name]:
            raise ValueError(f"--{name} {explicit[name]} contradicts the checkpoint, whose {name} is "
                             f"{net.arguments[name]}; leave the flag out")
    if explicit.get("no_bottleneck") and net.arguments["bottleneck"]:
        raise ValueError("--no-bottleneck contradicts the checkpoint, whose layers have bottlenecks; leave it out")
    epoch, flags = checkpoint.get("epoch"), checkpoint.get("flags")
    seed = flags.get("seed") if isinstance(flags, dict) else None
    for name, value in (("epoch", epoch), ("seed", seed)):
        if not (isinstance(value, int) and 0 <= value < 2**32):
            raise ValueError(f"{path} is not a checkpoint of train.py: its {name} is {value!r:.60}")
    if not untrained:
        return net, f"after epoch {epoch}"
    torch.manual_seed(seed)  # as train.py does before it builds the network
    return DenseNet(**net.arguments), f"before training (seed {seed})"


# --- drawing ----------------------------------------------------------------------------------------------------

def draw_reuse(maps: list[BlockMaps], title: str) -> Figure:
    """Draws two panels for each block: mean |w| above, mean |gamma w| below."""
    figure = Figure(figsize=(2.9 * len(maps) + 1.3, 6.5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    figure.suptitle(title, fontsize=11, color=INK)
    panels = figure.subplots(len(ROWS), len(maps), squeeze=False)
    for b, block in enumerate(maps):
        for row, name in enumerate(ROWS):
            draw_map(panels[row, b], getattr(block, name), block.follower)
        panels[0, b].set_title(f"Dense block {b + 1}", fontsize=12, color=INK, pad=8)
        panels[-1, b].set_xlabel(r"Target layer $\ell$", fontsize=11, color=INK)
    for row, name in enumerate(ROWS):
        panels[row, 0].set_ylabel(f"{ROWS[name]}\n" + r"Source layer $s$", fontsize=11, color=INK, linespacing=1.8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), CMAP), ax=panels, aspect=45, fraction=0.03, pad=0.02)
    bar.set_label("relative to the largest value of the column", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    bar.outline.set_visible(False)
    return figure


def draw_map(axes: Axes, values: torch.Tensor, follower: str) -> None:
    """Draws one map of BlockMaps, with a frame around the last column, the module that follows the block."""
    n = len(values)
    lines = {"edgecolor": "white", "linewidth": 1.2} if n <= 20 else {"edgecolor": "face", "linewidth": 0.1}
    axes.pcolormesh(range(n + 1), range(n + 1), values.numpy(), cmap=CMAP, vmin=0, vmax=1, **lines)
    axes.add_patch(Rectangle((n - 1, 0), 1, n, fill=False, edgecolor=INK, linewidth=1.4 if n <= 20 else 0.8,
                             clip_on=False, zorder=3))
    axes.set(xlim=(0, n), ylim=(n, 0), aspect="equal")
    step = 1 + (n - 2) // MAX_TICKS
    layers = range(step, n, step)
    labelled = [layer for layer in layers if n - layer >= n / 7]  # leaves space for the follower's name
    axes.set_xticks([layer - 0.5 for layer in labelled] + [n - 0.5], [*map(str, labelled), follower])
    axes.set_yticks([0.5] + [layer + 0.5 for layer in layers], ["input", *map(str, layers)])
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.tick_params(axis="x", pad=11)
    for label in axes.get_xticklabels():
        label.set_verticalalignment("baseline")
    axes.spines[:].set_visible(False)
    if n <= MAX_NUMBERED:
        for s, i in (~values.isnan()).nonzero().tolist():
            value = float(values[s, i])
            axes.text(i + 0.5, s + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                      color="white" if value > 0.55 else INK)
