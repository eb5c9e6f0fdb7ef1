"""DenseNet-BC (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017) in one importable file.

    from densenet import DenseNet, densenet121
    logProbabilities = DenseNet(growthRate=12, depth=100, reduction=0.5, nClasses=10)(images)

The network comes first, then ImageNet's networks by name and the loading of weights. At the end is the efficient dense
block: the same function, trained in less memory; ``efficient=False`` switches it off.
"""

import contextlib
import math
import operator
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

__version__ = "2.0.0"


class Bottleneck(nn.Module):
    """BN-ReLU-conv 1x1 to 4k channels, BN-ReLU-conv 3x3 to k, concatenated behind the input (paper, section 3)."""

    def __init__(self, nChannels: int, growthRate: int, dropRate: float = 0.0, bnSize: int = 4):
        super().__init__()
        interChannels = bnSize * growthRate
        self.bn1 = nn.BatchNorm2d(nChannels)
        self.conv1 = nn.Conv2d(nChannels, interChannels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(interChannels)
        self.conv2 = nn.Conv2d(interChannels, growthRate, kernel_size=3, padding=1, bias=False)
        self.dropRate = dropRate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C + k, H, W)"""
        out = dropout(self.conv1(F.relu(self.bn1(x))), self.dropRate, self.training)
        out = dropout(self.conv2(F.relu(self.bn2(out))), self.dropRate, self.training)
        return torch.cat((x, out), 1)


class SingleLayer(nn.Module):
    """The original layer, without bottleneck: BN-ReLU-conv 3x3 to k channels, concatenated behind the input."""

    def __init__(self, nChannels: int, growthRate: int, dropRate: float = 0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(nChannels)
        self.conv1 = nn.Conv2d(nChannels, growthRate, kernel_size=3, padding=1, bias=False)
        self.dropRate = dropRate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C + k, H, W)"""
        out = dropout(self.conv1(F.relu(self.bn1(x))), self.dropRate, self.training)
        return torch.cat((x, out), 1)


class Transition(nn.Module):
    """BN-ReLU-conv 1x1 to floor(reduction * C) channels, then 2x2 average pooling (paper, section 3)."""

    def __init__(self, nChannels: int, nOutChannels: int, dropRate: float = 0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(nChannels)
        self.conv1 = nn.Conv2d(nChannels, nOutChannels, kernel_size=1, bias=False)
        self.dropRate = dropRate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H // 2, W // 2)"""
        out = dropout(self.conv1(F.relu(self.bn1(x))), self.dropRate, self.training)
        return F.avg_pool2d(out, 2)


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return F.dropout(x, p, training) if p > 0 else x


class DenseNet(nn.Module):
    """DenseNet for small images (paper, section 4.2 and table 2) or for ImageNet (table 1).

    Input is (N, inChannels, H, W). Returns the log-probabilities (N, nClasses); ``net.fc(net.features(x))`` are the
    logits.

    Args:
        growthRate: k, the channels that each layer adds.
        depth: L, the number of layers with weights, for three equal blocks: 6n + 4 with bottleneck, 3n + 4 without.
            None is 100, or leaves the depth to ``blockConfig``.
        reduction: theta, the share of channels that a transition keeps, in (0, 1].
        nClasses: number of classes.
        bottleneck: True is the paper's B (1x1 convolution to 4k before each 3x3), False the original layer.
        blockConfig: layers of each block, instead of ``depth``: (6, 12, 24, 16) is DenseNet-121.
        smallInputs: True: a 3x3 convolution comes first; H and W are at least 4. False: ImageNet's 7x7 convolution
            with stride 2, batch norm ``bn0`` and 3x3 max pooling with stride 2, for images of 224x224.
        dropRate: dropout after every convolution but the first, in [0, 1); the paper uses 0.2 without augmentation.
        initChannels: channels of the first convolution; None is 2k. The paper's networks without bottleneck (1.0, 7.0
            and 27.2 M parameters) have 16, and reduction 1.
        inChannels: channels of the images.
        bnSize: the bottleneck's width as a multiple of k; the paper's is 4.
        efficient: how dense blocks are computed in training. True: the exact function, in memory linear in depth.
            "max": in less memory again, at the cost of one more 1x1 convolution per layer. False: by the textbook
            layers above, which also run in evaluation and wherever ``block_is_exact`` says no.

    Convolutions start normally distributed, with mean 0 and standard deviation sqrt(2 / (kernel area * output
    channels)) (He et al. 2015, equation 14); batch norms at 1 and 0; the classifier's weight as torch's Linear, its
    bias at 0.

    Raises:
        ValueError: for impossible geometry, with the nearest valid values.
    """

    def __init__(self, growthRate: int = 12, depth: int | None = None, reduction: float = 0.5, nClasses: int = 10,
                 bottleneck: bool = True, *, blockConfig: Sequence[int] | None = None, smallInputs: bool = True,
                 dropRate: float = 0.0, initChannels: int | None = None, inChannels: int = 3, bnSize: int = 4,
                 efficient: bool | str = True):
        super().__init__()
        if depth is None and blockConfig is None:
            depth = 100
        if efficient not in (True, False, "max"):
            raise ValueError(f"efficient is {efficient!r}; valid are True, False and 'max'")
        self.efficient = efficient
        self.arguments = checked_arguments(
            growthRate=growthRate, depth=depth, reduction=reduction, nClasses=nClasses, bottleneck=bottleneck,
            blockConfig=blockConfig, smallInputs=smallInputs, dropRate=dropRate, initChannels=initChannels,
            inChannels=inChannels, bnSize=bnSize)
        (growthRate, depth, reduction, nClasses, bottleneck, blockConfig, smallInputs, dropRate, initChannels,
         inChannels, bnSize) = self.arguments.values()  # Python's numbers

        layers = blockConfig or [(depth - 4) // (6 if bottleneck else 3)] * 3
        self.nBlocks = len(layers)
        layer = partial(Bottleneck, bnSize=bnSize) if bottleneck else SingleLayer
        nChannels = 2 * growthRate if initChannels is None else initChannels
        window = dict(kernel_size=3, padding=1) if smallInputs else dict(kernel_size=7, stride=2, padding=3)
        self.conv1 = nn.Conv2d(inChannels, nChannels, bias=False, **window)
        if not smallInputs:
            self.bn0 = nn.BatchNorm2d(nChannels)
        for b, n in enumerate(layers, 1):
            block = nn.Sequential(*(layer(nChannels + i * growthRate, growthRate, dropRate) for i in range(n)))
            self.add_module(f"dense{b}", block)
            nChannels += n * growthRate
            if b < self.nBlocks:
                nOutChannels = math.floor(nChannels * reduction)
                if nOutChannels < 1:
                    raise ValueError(f"reduction is {reduction}, which leaves none of the {nChannels} channels after "
                                     f"block {b}; valid is 1/{nChannels} to 1")
                self.add_module(f"trans{b}", Transition(nChannels, nOutChannels, dropRate))
                nChannels = nOutChannels
        self.bn1 = nn.BatchNorm2d(nChannels)
        self.fc = nn.Linear(nChannels, nClasses)

        for m in self.modules():
            if isinstance(m, nn.Conv2d) and not m.weight.is_meta:  # on the meta device normal_ would import for seconds
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.fc(self.features(x))
        is_symbolic = isinstance(logits, torch.fx.Proxy)  # a proxy has no dtype
        return F.log_softmax(logits, 1, dtype=None if is_symbolic else torch.promote_types(logits.dtype, torch.float32))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """-> the pooled features (N, C) that the classifier reads; shapes in comments: BC 100-12 on CIFAR"""
        self.check_input(x)
        x = self.conv1(x)  # (N, 3, 32, 32) -> (N, 24, 32, 32)
        if not self.arguments["smallInputs"]:
            x = F.max_pool2d(F.relu(self.bn0(x)), kernel_size=3, stride=2, padding=1)
        if self.efficient and block_is_exact(self, x):
            return efficient_features(self, x)
        for b in range(1, self.nBlocks):
            x = self.get_submodule(f"dense{b}")(x)  # -> (N, 216, 32, 32), then (N, 300, 16, 16)
            x = self.get_submodule(f"trans{b}")(x)  # -> (N, 108, 16, 16), then (N, 150, 8, 8)
        x = self.get_submodule(f"dense{self.nBlocks}")(x)  # -> (N, 342, 8, 8)
        return F.relu(self.bn1(x)).mean((2, 3))  # -> (N, 342)

    def check_input(self, x: torch.Tensor) -> None:
        """Raises ValueError if x has another number of channels, or is smaller than the network's transitions need."""
        stem = self.conv1
        if type(stem) is not nn.Conv2d or isinstance(x, torch.fx.Proxy):
            return  # a replaced stem checks its own input; a symbolic trace has no shapes
        if x.dim() != 4 or x.shape[1] != stem.in_channels:
            raise ValueError(f"input has shape {tuple(x.shape)}; valid is (N, {stem.in_channels}, H, W)")
        least = 2 ** sum(type(module) is Transition for module in self.children())  # leaves one pixel after the last
        if not self.arguments["smallInputs"]:
            least = 2 * least - 1  # max pooling rounds up
        least = stem.stride[0] * (least - 1) + 1  # so does the stem
        if x.shape[2] < least or x.shape[3] < least:
            raise ValueError(f"input is {x.shape[2]}x{x.shape[3]}, too small for the network's transitions, "
                             f"which halve it; valid is {least}x{least} or more")

    def load_weights(self, state_dict: Mapping[str, Any], classifier: bool = True) -> None:
        """Loads weights and running statistics of the same network, in place, under any of the names of ``our_names``.

        ``classifier=False`` keeps this network's ``fc``, for example for other classes, and ignores the other's.

        Raises:
            ValueError: naming the first entry that is missing, unknown or of another shape; nothing is changed then.
        """
        found, own = our_names(state_dict), self.state_dict()
        if not classifier:
            found, own = ({name: value for name, value in entries.items() if not name.startswith("fc.")}
                          for entries in (found, own))
        for name, value in own.items():
            if name not in found:
                if name.endswith("num_batches_tracked"):  # which older files lack
                    continue
                raise ValueError(f"the weights have no {name}: they are another network's")
            if found[name].shape != value.shape:
                hint = "; classifier=False keeps this network's own" if name.startswith("fc.") else ""
                raise ValueError(f"{name} has shape {tuple(found[name].shape)}; valid is {tuple(value.shape)}{hint}")
        if unknown := found.keys() - own.keys():
            raise ValueError(f"the weights have {min(unknown)}, which this network does not have")
        self.load_state_dict(found, strict=False)

    load_torchvision = load_weights  # its name in version 1

    def torchvision_state_dict(self) -> dict[str, torch.Tensor]:
        """-> the state dict under torchvision's names, for its network of the same shape"""
        return {torchvision_name(name): value for name, value in self.state_dict().items()}


def checked_arguments(**a) -> dict[str, Any]:
    """-> DenseNet's arguments as Python's numbers, which a checkpoint can hold. Raises ValueError, naming an impossible
    value and the valid ones."""
    for name in ("growthRate", "depth", "nClasses", "initChannels", "inChannels", "bnSize"):
        if a[name] is not None:
            a[name] = operator.index(a[name])
            if a[name] < 1:
                raise ValueError(f"{name} is {a[name]}; valid are whole numbers from 1")
    a |= {name: bool(a[name]) for name in ("bottleneck", "smallInputs")}
    a |= {name: float(a[name]) for name in ("reduction", "dropRate")}
    if a["depth"] is not None and a["blockConfig"] is not None:
        raise ValueError(f"depth is {a['depth']} and blockConfig {a['blockConfig']}; valid is one of them")
    if a["blockConfig"] is not None:
        a["blockConfig"] = [operator.index(n) for n in a["blockConfig"]]
        if not a["blockConfig"] or min(a["blockConfig"]) < 1:
            raise ValueError(f"blockConfig is {a['blockConfig']}; valid are whole numbers from 1, one for each block")
    depth, step = a["depth"], 6 if a["bottleneck"] else 3
    if depth is not None and (depth < 4 + step or (depth - 4) % step):
        below = max(1, (depth - 4) // step) * step + 4
        nearest = f"{below}" if depth < below else f"{below} and {below + step}"
        kind = "with" if a["bottleneck"] else "without"
        raise ValueError(f"depth is {depth}; valid {kind} bottleneck is {step}n + 4, nearest {nearest}")
    if not 0 < a["reduction"] <= 1:
        raise ValueError(f"reduction is {a['reduction']}; valid is above 0 and at most 1")
    if not 0 <= a["dropRate"] < 1:
        raise ValueError(f"dropRate is {a['dropRate']}; valid is from 0 to below 1")
    return a


# --- ImageNet's networks ----------------------------------------------------------------------------------------

def densenet121(nClasses: int = 1000, **arguments) -> DenseNet:
    """DenseNet-BC 121 for images of 224x224 (paper, table 1): 7,978,856 parameters; ``arguments``: see DenseNet."""
    return DenseNet(32, nClasses=nClasses, blockConfig=(6, 12, 24, 16), smallInputs=False, **arguments)


def densenet169(nClasses: int = 1000, **arguments) -> DenseNet:
    """DenseNet-BC 169 for images of 224x224 (paper, table 1): 14,149,480 parameters; ``arguments``: see DenseNet."""
    return DenseNet(32, nClasses=nClasses, blockConfig=(6, 12, 32, 32), smallInputs=False, **arguments)


def densenet201(nClasses: int = 1000, **arguments) -> DenseNet:
    """DenseNet-BC 201 for images of 224x224 (paper, table 1): 20,013,928 parameters; ``arguments``: see DenseNet."""
    return DenseNet(32, nClasses=nClasses, blockConfig=(6, 12, 48, 32), smallInputs=False, **arguments)


def densenet161(nClasses: int = 1000, **arguments) -> DenseNet:
    """DenseNet-BC 161, k=48, of the authors' code, for 224x224: 28,681,000 parameters; ``arguments``: see DenseNet."""
    return DenseNet(48, nClasses=nClasses, blockConfig=(6, 12, 36, 24), smallInputs=False, **arguments)


# --- loading weights --------------------------------------------------------------------------------------------

def load(file: str | os.PathLike | BinaryIO, device: str | torch.device = "cpu") -> DenseNet:
    """-> the trained network of a checkpoint that train.py wrote, in evaluation mode

    It has the attributes ``mean`` and ``std`` (inChannels, 1, 1), which normalise images in [0, 1]: (images - mean) /
    std; and ``classes``, the names of its outputs.

    Raises:
        ValueError: if the file is damaged or not such a checkpoint.
        OSError: if it cannot be read.
    """
    return network_of(read_checkpoint(file), file).to(device)


def network_of(checkpoint: dict, file: str | os.PathLike | BinaryIO) -> DenseNet:
    """-> as ``load``, from the content of ``file``; raises ValueError if it makes no sense"""
    try:
        arguments, model, classes = (checkpoint[name] for name in ("arguments", "model", "classes"))
        layers = sum(arguments["blockConfig"] or [arguments["depth"]])
        stored = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.values()}.values())
        size = sum(tensor.nbytes for tensor in model.values())
        if layers > len(model) or size > stored:
            raise ValueError(f"it declares {layers} layers in {size} bytes, but has {len(model)} tensors in {stored}")
        with torch.device("meta"):  # takes no memory, whatever is declared
            net = DenseNet(**arguments)
        net.load_state_dict(model, assign=True)
        for name in ("mean", "std"):
            value = torch.tensor(checkpoint[name], dtype=torch.float32)
            net.register_buffer(name, value.view(net.conv1.in_channels, 1, 1), persistent=False)
        net.classes = [str(name) for name in classes]
        if len(classes) != net.fc.out_features:
            raise ValueError(f"it has {len(classes)} classes for {net.fc.out_features} outputs")
        return net.float().eval()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a checkpoint of this train.py ({one_line(error)})") from None


class ForeignFile(ValueError):
    """An undamaged file that is no checkpoint of train.py."""


def read_checkpoint(file: str | os.PathLike | BinaryIO) -> dict[str, Any]:
    """-> the dict that train.py saved, on the CPU; its keys are listed in lib/run.py

    Raises: as ``load``; ForeignFile if the file is undamaged but something else.
    """
    checkpoint = read_file(file)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != 1:
        raise ForeignFile(f"{file} is not a checkpoint of this train.py: its format is {found!s:.60}; valid is 1")
    return checkpoint


def read_file(file: str | os.PathLike | BinaryIO) -> Any:
    """-> what ``torch.save`` wrote, on the CPU: a path's content, or that of an open binary file

    Each byte is checked by the archive's checksums, which ``torch.load`` ignores (files of torch before 1.6 have none).
    No code that the file may hold is run.

    Raises:
        ValueError: if the file is damaged; ForeignFile if it holds other objects than tensors and plain values.
        OSError: if it cannot be read.
    """
    if not hasattr(file, "read") and os.path.exists(file) and not os.path.isfile(file):
        raise ForeignFile(f"{file} is not a regular file")
    try:
        with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened:
            if zipfile.is_zipfile(opened):
                with zipfile.ZipFile(opened) as archive:
                    if bad := archive.testzip():
                        raise ValueError(f"wrong checksum of {bad}")
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile's, zlib's, struct's, torch's: a flipped bit can cause any of them
        is_pickle = isinstance(error, pickle.UnpicklingError)
        if is_pickle and "Unsupported operand" in str(error):  # the first byte of a text, say
            error = "it is neither an archive nor a pickle"
        elif is_pickle:
            raise ForeignFile(f"{file} holds other objects than tensors and plain values, such as a whole network, and "
                              "loading those could run code; save its state_dict() instead") from None
        raise ValueError(f"{file} is damaged, or was not written by torch.save ({one_line(error)})") from None


def one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:160]


def our_names(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """-> the weights under this file's names, from any of these:

    - our own, as in a checkpoint of train.py (under "model") or of the ancestor
    - torchvision's: features.denseblock1.denselayer1.norm1 (norm.1 in older files) is dense1.0.bn1
    - andreasveit/densenet-pytorch's, used for out-of-distribution detection: block1.layer.0.bn1 is dense1.0.bn1

    They may be under "state_dict" or "model", with the prefix "module." of DDP or "_orig_mod." of torch.compile.

    Raises:
        ValueError: if ``state_dict`` is no dict of names and tensors.
    """
    for key in ("state_dict", "model"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not (isinstance(state_dict, Mapping) and all(torch.is_tensor(value) for value in state_dict.values())):
        raise ValueError(f"the weights are a {type(state_dict).__name__}; valid is a dict of names and tensors")
    ours = {}
    for name, value in state_dict.items():
        for pattern, replacement in OUR_NAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return ours


OUR_NAMES = (  # replaced one after the other
    (r"^module\.|_orig_mod\.", ""),
    (r"\.(norm|conv)\.([12])\.", r".\1\2."),
    (r"^features\.denseblock(\d+)\.denselayer(\d+)\.", lambda match: f"dense{match[1]}.{int(match[2]) - 1}."),
    (r"^features\.transition(\d+)\.(norm|conv)\.", r"trans\1.\g<2>1."),
    (r"^features\.conv0\.", "conv1."),
    (r"^features\.norm0\.", "bn0."),
    (r"^features\.norm5\.", "bn1."),
    (r"^block(\d+)\.layer\.", r"dense\1."),
    (r"^((?:dense|trans)\d.*)\.norm([12])\.", r"\1.bn\2."),
    (r"^classifier\.", "fc."))


def torchvision_name(name: str) -> str:
    """-> torchvision's name of a module, parameter or buffer here: dense1.0.bn1 is
    features.denseblock1.denselayer1.norm1. Names that DenseNet does not have stay as they are."""
    name = name.replace("_orig_mod.", "")  # torch.compile's
    if match := re.fullmatch(r"dense(\d+)\.(\d+)(.*)", name):
        return f"features.denseblock{match[1]}.denselayer{int(match[2]) + 1}{match[3].replace('bn', 'norm')}"
    if match := re.fullmatch(r"trans(\d+)(.*)", name):
        return f"features.transition{match[1]}{match[2].replace('bn1', 'norm').replace('conv1', 'conv')}"
    head, dot, rest = name.partition(".")
    return {"conv1": "features.conv0", "bn0": "features.norm0", "bn1": "features.norm5",
            "fc": "classifier"}.get(head, head) + dot + rest


# ----------------------------------------------------------------------------------------------------------------
# The efficient dense block
# ----------------------------------------------------------------------------------------------------------------

TILE = 8192  # pixels of a tile on a CPU: 16384 takes 0.95 to 0.99 of the time, but 1.15 of the memory


def efficient_features(net: DenseNet, x: torch.Tensor) -> torch.Tensor:
    """-> ``net.features`` from the stem's output x on, by the function below instead of the textbook layers"""
    for b in range(1, net.nBlocks):
        block, trans = net.get_submodule(f"dense{b}"), net.get_submodule(f"trans{b}")
        # without dropout between them, pool(conv(a)) = conv(pool(a)) for a 1x1 convolution, which then costs a quarter
        pool = (1, 1) if trans.dropRate > 0 else (2, 2)
        x = trans.conv1(efficient_block(net, block, trans.bn1, x, pool))
        if trans.dropRate > 0:
            x = F.avg_pool2d(F.dropout(x, trans.dropRate), 2)
    last = net.get_submodule(f"dense{net.nBlocks}")
    return efficient_block(net, last, net.bn1, x, pool=tuple(x.shape[2:])).flatten(1)


class BlockSpec(NamedTuple):
    bottleneck: bool
    eps: float
    dropRate: float
    pool: tuple[int, int]  # the average pooling's window: (1, 1) is none, (H, W) the global mean
    recompute: bool  # the backward pass repeats the bottleneck's 1x1 convolution: its output is not kept
    dtype: torch.dtype  # of activations; statistics and gradients of parameters have the parameters' dtype


def efficient_block(net: DenseNet, block: nn.Sequential, norm: nn.BatchNorm2d, x: torch.Tensor,
                    pool: tuple[int, int]) -> torch.Tensor:
    """-> ``avg_pool2d(relu(norm(block(x))), pool)``; updates the running statistics of every batch norm"""
    bottleneck = type(block[0]) is Bottleneck
    outer, inner = [*(layer.bn1 for layer in block), norm], [layer.bn2 for layer in block if bottleneck]
    names = ["bn1.weight", "bn1.bias", "conv1.weight"]
    if bottleneck:
        names += ["bn2.weight", "bn2.bias", "conv2.weight"]
    parameters = [layer.get_parameter(name) for layer in block for name in names]
    spec = BlockSpec(bottleneck, norm.eps, block[0].dropRate, pool, net.efficient == "max",
                     activation_dtype(x, norm.weight))
    with torch.autocast(x.device.type, enabled=False):  # the block casts by itself
        out, mean, var, *of_inner = EfficientBlock.apply(x, spec, *parameters, norm.weight, norm.bias)
    with torch.no_grad():  # all norms together: on a GPU a few launches instead of three for each norm
        means, variances = [mean] * len(outer) + of_inner[::2], [var] * len(outer) + of_inner[1::2]
        for name, new in (("running_mean", means), ("running_var", variances)):
            running = [getattr(m, name) for m in outer + inner]
            new = [value[:len(old)] for value, old in zip(new, running, strict=True)]  # the channels that m reads
            torch._foreach_lerp_(running, new, norm.momentum)
        torch._foreach_add_([m.num_batches_tracked for m in outer + inner], 1)
    return out


class EfficientBlock(torch.autograd.Function):
    """A dense block in training mode, with the batch norm, ReLU and average pooling that follow it.

    Channel c of the block has one batch mean and variance, however many layers normalise it. Hence

        xhat_c = (x_c - mean_c) rstd_c              once per channel, when the channel is made
        a_l    = relu(gamma_l xhat[:C_l] + beta_l)  recomputed when needed, never kept
        h_l    = W_l a_l                            the layer's first convolution

    and backward, from the norm after the block to the first layer, where G is the gradient of xhat, the sum over all
    these readers. When it is a layer's turn, all readers of its k channels have added to their G, and dx is complete:

        da_l     = W_l^T dh_l, zero where a_l is zero
        dbeta_l  = sum(da_l),  dgamma_l = sum(da_l xhat)
        G[:C_l] += gamma_l da_l
        dx_c     = rstd_c (G_c - mean(G_c) - xhat_c mean(G_c xhat_c))   once per channel

    The two means need no pass over G: sum(G_c) and sum(G_c xhat_c) are the sums over its readers of gamma_l dbeta_l and
    of gamma_l dgamma_l. A bottleneck's second batch norm is the same with a single reader. The parameters, xhat, rstd
    and a ``Kept`` for each layer are kept for the backward pass.

    Schlüter shared xhat before, with a scale and shift per layer (Lasagne/Recipes, densenet_fast.py, 2016); Jung et
    al. split and fused batch norm on a CPU (arXiv 1807.01702). New are the exact backward pass in memory linear in
    depth without recomputed convolutions, and correct running statistics.

    Tensors are channels_last, where the first C_l channels are a strided matrix that needs no copy. What is kept and G
    are whole tensors; everything else is a list of tiles of a few images, whose temporary tensors are small.
    """

    @staticmethod
    def forward(ctx, x, spec, *parameters):
        """-> pooled activations (N, C, H', W'); then, without gradient, mean and unbiased variance of the block's
        channels, and for each bottleneck those of its inner channels"""
        layers, gamma, beta = split_layers(parameters, spec)
        xhat, c = new_like(x, len(gamma), spec.dtype), x.shape[1]
        statistics, inner, kept = [normalise(tiles(x), tiles(xhat[:, :c]), spec.eps)], [], []
        for stages in layers:
            h = relu_then(tiles(xhat[:, :c]), *stages[0])  # 4k channels, k without bottleneck
            h, mask = drop(h, spec.dropRate)
            row = Kept(mask)
            if spec.bottleneck:
                hhat = new_like(x, len(stages[0].weight), spec.dtype)
                mean2, var2, rstd2 = normalise(h, tiles(hhat), spec.eps)
                inner += mean2, var2
                h, mask2 = drop(relu_then(tiles(hhat), *stages[1]), spec.dropRate)  # k channels
                row = Kept(mask, mean2, rstd2, None if spec.recompute else hhat, mask2)
            new = slice(c, c + len(stages[-1].weight))
            statistics.append(normalise(h, tiles(xhat[:, new]), spec.eps))
            c = new.stop
            kept += row
        mean, var, rstd = map(torch.cat, zip(*statistics, strict=True))
        out = torch.cat(relu_then(tiles(xhat), gamma, beta, spec.pool))

        ctx.spec, ctx.nParameters = spec, len(parameters)
        ctx.save_for_backward(*parameters, xhat, rstd, *kept)
        ctx.mark_non_differentiable(mean, var, *inner)
        ctx.set_materialize_grads(False)  # otherwise zeros are made as gradients of these, too
        return out, mean, var, *inner

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:  # what reads the block's output gives no gradient
            return (None,) * (2 + ctx.nParameters)
        batched = torch._C._functorch.is_legacy_batchedtensor(dout) or torch._C._functorch.is_batchedtensor(dout)
        if torch.is_grad_enabled() or batched:
            raise RuntimeError("the efficient dense block can be differentiated only once, and for one gradient at a "
                               "time; for second derivatives (create_graph=True) and batched ones (is_grads_batched, "
                               "vectorize) build the network with efficient=False")
        with torch.autocast(dout.device.type, enabled=False):
            return EfficientBlock.gradients(ctx.spec, dout, ctx.saved_tensors, ctx.nParameters)

    @staticmethod
    def gradients(spec, dout, saved, nParameters):
        layers, gamma, beta = split_layers(saved[:nParameters], spec)
        xhat, rstd, *kept = saved[nParameters:]
        size = len(Kept._fields)
        rows = [Kept(*kept[i:i + size]) for i in range(0, len(kept), size)]
        G = torch.zeros_like(xhat, dtype=gamma.dtype)
        (dgamma, dbeta), _ = relu_then_backward(dout.tensor_split(len(tiles(G))), tiles(xhat), gamma, beta, spec.pool,
                                                tiles(G))
        sum_G, sum_Gxhat = gamma * dbeta, gamma * dgamma
        grads = [dgamma, dbeta]
        for stages, row in zip(reversed(layers), reversed(rows), strict=True):
            first, last = stages[0], stages[-1]  # the same without bottleneck
            c = len(first.gamma)  # channels that the layer reads
            new = slice(c, c + len(last.weight))
            dh = normalise_backward(tiles(G[:, new]), tiles(xhat[:, new]), rstd[new], sum_G[new], sum_Gxhat[new])
            if spec.bottleneck:
                hhat = row.hhat
                if spec.recompute:
                    h = masked(relu_then(tiles(xhat[:, :c]), *first), row.mask, spec.dropRate)
                    hhat = new_like(xhat, len(first.weight), spec.dtype)
                    standardise(h, tiles(hhat), row.mean2, row.rstd2)
                dh = masked(dh, row.mask2, spec.dropRate)
                (dgamma, dbeta, dweight), da = relu_then_backward(dh, tiles(hhat), *last)
                # its G is gamma da: gamma may as well be multiplied by rstd
                dh = normalise_backward(da, tiles(hhat), last.gamma * row.rstd2, sum_G=dbeta, sum_Gxhat=dgamma)
                grads = [dgamma, dbeta, dweight, *grads]
            dh = masked(dh, row.mask, spec.dropRate)
            (dgamma, dbeta, dweight), _ = relu_then_backward(dh, tiles(xhat[:, :c]), *first, tiles(G[:, :c]))
            grads = [dgamma, dbeta, dweight, *grads]
            sum_G[:c] += first.gamma * dbeta
            sum_Gxhat[:c] += first.gamma * dgamma
        dx = normalise_backward(tiles(G[:, :c]), tiles(xhat[:, :c]), rstd[:c], sum_G[:c], sum_Gxhat[:c])
        return torch.cat(dx), None, *grads


class Kept(NamedTuple):
    """What a layer keeps for the backward pass; None: what it does not need."""

    mask: torch.Tensor | None  # of dropout after the first convolution
    mean2: torch.Tensor | None = None  # of a bottleneck's inner 4k channels
    rstd2: torch.Tensor | None = None
    hhat: torch.Tensor | None = None  # these channels, normalised; not with ``recompute``
    mask2: torch.Tensor | None = None  # of dropout after the second convolution


class Stage(NamedTuple):
    """Batch norm, ReLU and convolution: a layer has two with bottleneck, else one."""

    gamma: torch.Tensor
    beta: torch.Tensor
    weight: torch.Tensor


def split_layers(parameters, spec):
    """-> the stages of each layer; gamma and beta of the norm that follows the block"""
    *parameters, gamma, beta = parameters
    stages = [Stage(g, b, weight.to(spec.dtype))
              for g, b, weight in zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)]
    n = 2 if spec.bottleneck else 1
    return [stages[i:i + n] for i in range(0, len(stages), n)], gamma, beta


def new_like(x, channels, dtype):
    return torch.empty((len(x), channels, *x.shape[2:]), dtype=dtype, device=x.device,
                       memory_format=torch.channels_last)


def tiles(x):
    """-> the tensor in tiles of whole images; on a GPU, which gains nothing by tiles, in one"""
    n, _, height, width = x.shape
    return x.tensor_split(-(-n // max(1, TILE // (height * width)))) if x.device.type == "cpu" else (x,)


# --- functions of lists of tiles ---

def relu_then(xhat, gamma, beta, reader):
    """-> what ``reader`` makes of a = relu(gamma xhat + beta): a convolution's weight or the size of a pooling"""
    return [read(reader, affine_relu(tile, gamma, beta)) for tile in xhat]


def relu_then_backward(dout, xhat, gamma, beta, reader, G=None):
    """Adds gamma da to G, if given. -> [dgamma, dbeta], and dweight if the reader is a weight; da if there is no G"""
    results = [tile_backward(*tile, gamma, beta, reader)
               for tile in zip(dout, xhat, G or [None] * len(xhat), strict=True)]
    grads, da = zip(*results, strict=True)
    return [sum(values[1:], start=values[0]) for values in zip(*grads, strict=True)], da


def normalise(x, xhat, eps):
    """Writes xhat. -> mean, unbiased variance and rstd = 1 / sqrt(biased variance + eps) over N, H and W"""
    means, variances = (torch.cat(v) for v in zip(*map(image_moments, x), strict=True))
    mean, m = means.mean(0), pixels(x)
    var = (variances + (means - mean).square()).mean(0)  # an image's variance is about its own mean
    rstd = (var + eps).rsqrt()
    standardise(x, xhat, mean, rstd)
    return mean, var * (m / (m - 1)), rstd


def standardise(x, xhat, mean, rstd):
    for tile, out in zip(x, xhat, strict=True):
        out.copy_(torch.addcmul(column(-mean * rstd), tile, column(rstd)))


def normalise_backward(G, xhat, rstd, sum_G, sum_Gxhat):
    """-> dx = rstd (G - mean(G) - xhat mean(G xhat))"""
    m = pixels(G)
    shift, slope, rstd = column(sum_G * rstd / -m), column(sum_Gxhat * rstd / -m), column(rstd)
    return [torch.addcmul(shift, g, rstd).addcmul_(tile, slope).to(tile.dtype)
            for g, tile in zip(G, xhat, strict=True)]


def drop(h, p):
    """-> h after dropout; the mask, None without dropout"""
    mask = torch.cat([F.dropout(torch.ones_like(tile), p).bool() for tile in h]) if p > 0 else None
    return masked(h, mask, p), mask


def masked(h, mask, p):
    """-> what dropout with this mask makes of h, or of the gradient of its output"""
    return h if mask is None else [tile * m / (1 - p) for tile, m in zip(h, tiles(mask), strict=True)]


def pixels(x):
    """-> N H W, the number of values of a channel"""
    return sum(map(len, x)) * x[0].shape[2:].numel()


# --- functions of one tile ---

def tile_backward(dout, xhat, G, gamma, beta, reader):
    """As relu_then_backward."""
    result, *dweight = read_backward(reader, dout, affine_relu(xhat, gamma, beta))
    # sums over tiles have the parameters' dtype: bfloat16 would round each addition
    da, dweight = result.to(gamma.dtype), [d.to(gamma.dtype) for d in dweight]  # da is the result if it has it already
    dbeta = da.sum((2, 3)).sum(0)  # in two steps: over all three is slow on a CPU
    if G is None:
        return [(da * xhat).sum((2, 3)).sum(0), dbeta, *dweight], result
    G.addcmul_(da, column(gamma))
    del result  # this, and the product in place: less memory
    return [da.mul_(xhat).sum((2, 3)).sum(0), dbeta, *dweight], None


def affine_relu(xhat, gamma, beta):
    return torch.addcmul(column(beta), xhat, column(gamma)).to(xhat.dtype).relu_()


def read(reader, a):
    if isinstance(reader, tuple):
        return F.avg_pool2d(a, reader)
    return F.conv2d(a, reader, padding=reader.shape[-1] // 2)


def read_backward(reader, dout, a):
    """-> da, zero where a is zero; the gradient of the reader if it is a weight"""
    if isinstance(reader, tuple):
        grads = [torch.ops.aten.avg_pool2d_backward(dout, a, reader, reader, (0, 0), False, True, None)]
    else:
        padding = reader.shape[-1] // 2
        grads = torch.ops.aten.convolution_backward(
            dout, a, reader, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, (True, True, False))[:2]
    torch.ops.aten.threshold_backward.grad_input(grads[0], a, 0, grad_input=grads[0])
    return grads


def image_moments(x):
    """-> mean and biased variance of each image and channel, (N, C)"""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean((2, 3), keepdim=True)
    return mean[:, :, 0, 0], (x - mean).pow_(2).mean((2, 3))


def column(v):
    """(C,) -> (C, 1, 1), which broadcasts over (N, C, H, W)"""
    return v.view(-1, 1, 1)


# --- where the efficient block is exact --------------------------------------------------------------------------

def block_is_exact(net: DenseNet, x: torch.Tensor) -> bool:
    """Whether ``efficient_features`` computes what the network's own modules do: all modules of its blocks and
    transitions, and its last norm, are of the kind that DenseNet makes, unchanged and in training mode, and nothing
    hooks or traces them.

    x: the stem's output.
    """
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or nn.modules.module._has_any_global_hook()
            # torch.func and forward-mode differentiation see only torch's own operations
            or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
            or type(x) is not torch.Tensor or x.device.type not in ("cpu", "cuda")):
        return False
    blocks = [net.get_submodule(f"dense{b}") for b in range(1, net.nBlocks + 1)]
    transitions = [net.get_submodule(f"trans{b}") for b in range(1, net.nBlocks)]
    layers = [layer for block in blocks for layer in block.children()]
    if not ({type(block) for block in blocks} == {nn.Sequential} and {type(t) for t in transitions} <= {Transition}
            and all(map(len, blocks)) and {type(layer) for layer in layers} in ({Bottleneck}, {SingleLayer})):
        return False
    bottlenecks = layers if type(layers[0]) is Bottleneck else []
    last, scale = net.bn1, 2 ** len(transitions)
    norms = [m.bn1 for m in (*layers, *transitions)] + [m.bn2 for m in bottlenecks] + [last]
    pointwise = [m.conv1 for m in (*bottlenecks, *transitions)]
    spatial = [m.conv2 for m in bottlenecks] or [m.conv1 for m in layers]
    modules = [*blocks, *layers, *transitions, *norms, *pointwise, *spatial]
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    are_unchanged = (
        {type(m) for m in norms} == {nn.BatchNorm2d} and {type(m) for m in (*pointwise, *spatial)} == {nn.Conv2d}
        and all(m.training and vars(m).keys().isdisjoint(OVERRIDES) for m in modules)
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
                    for m in modules)
        and len({m.dropRate for m in (*layers, *transitions)}) == 1 and 0 <= layers[0].dropRate < 1)
    return (
        are_unchanged
        and all(type(m.weight) is type(m.bias) is nn.Parameter and m.track_running_stats and m.running_mean is not None
                and m.num_batches_tracked is not None and m.momentum is not None
                and (m.momentum, m.eps) == (last.momentum, last.eps) for m in norms)
        and all(type(m.weight) is nn.Parameter and m.bias is None and m.stride == m.dilation == (1, 1) and m.groups == 1
                and m.kernel_size == (size, size) and m.padding == (size // 2, size // 2) and m.padding_mode == "zeros"
                for convs, size in ((pointwise, 1), (spatial, 3)) for m in convs)
        # one device; float32 or float64, or by autocast its dtype
        and all(p.device == x.device and p.dtype == last.weight.dtype for p in parameters)
        and last.weight.dtype in (torch.float32, torch.float64)
        and x.dtype in (last.weight.dtype, activation_dtype(x, last.weight))
        # with a single value per channel the textbook layers raise torch's error
        and len(x) * (x.shape[2] // scale) * (x.shape[3] // scale) > 1)


OVERRIDES = ("forward", "_conv_forward", "_compiled_call_impl")  # what an instance may have instead of its class


def activation_dtype(x: torch.Tensor, parameter: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and parameter.dtype == torch.float32:
        return torch.get_autocast_dtype(x.device.type)
    return parameter.dtype
