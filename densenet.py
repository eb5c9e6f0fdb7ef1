"""DenseNet-BC (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017) in one importable file.

    from densenet import DenseNet, densenet121
    logProbabilities = DenseNet(growthRate=12, depth=100, reduction=0.5, nClasses=10)(images)

The textbook network comes first, then ImageNet's networks by name and the loading of weights. At the end is the
efficient dense block: the same function, trained in less memory and less time; ``efficient=False`` switches it off.
"""

import contextlib
import errno
import math
import numbers
import os
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial, reduce
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as nn_module

__version__ = "1.1.0"


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


class DenseBlock(nn.Sequential):
    """Layers, each of which reads the block's input and the outputs of all layers before it.

    ``last_path``: how the last forward pass was computed, "textbook", "efficient" or "max", or after
    ``DenseNet.compile_block`` "compiled efficient" or "compiled max"; None before the first.
    """

    last_path: str | None = None


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
            and 27.2 M parameters) have 16.
        inChannels: channels of the images.
        bnSize: the bottleneck's width as a multiple of k; the paper's is 4.
        efficient: how dense blocks are computed in training. True: the exact function, in memory linear in depth.
            "max": in less memory again, at the cost of one more 1x1 convolution per layer. False: by the textbook
            layers above, which also run in evaluation and with hooks, ``torch.compile``, export and the like.

    Convolutions start at N(0, sqrt(2 / (kernel area * output channels))): a ReLU halves the signal's power, so this
    keeps the variance of the *gradients* constant through depth (He et al. 2015, equation 14); batch norm does so for
    the activations. Batch norms start at 1 and 0, the classifier's bias at 0.

    Raises:
        ValueError: for impossible geometry, with the nearest valid values.
    """

    block_is_compiled = False  # see compile_block

    def __init__(self, growthRate: int = 12, depth: int | None = None, reduction: float = 0.5, nClasses: int = 10,
                 bottleneck: bool = True, *, blockConfig: Sequence[int] | None = None, smallInputs: bool = True,
                 dropRate: float = 0.0, initChannels: int | None = None, inChannels: int = 3, bnSize: int = 4,
                 efficient: bool | str = True):
        super().__init__()
        if depth is None and blockConfig is None:
            depth = 100
        if efficient not in (True, False, "max"):
            raise ValueError(f"efficient is {efficient!r}; valid are True, False and 'max'")
        self.arguments = checked_arguments(
            growthRate=growthRate, depth=depth, reduction=reduction, nClasses=nClasses, bottleneck=bottleneck,
            blockConfig=blockConfig, smallInputs=smallInputs, dropRate=dropRate, initChannels=initChannels,
            inChannels=inChannels, bnSize=bnSize)
        (growthRate, depth, reduction, nClasses, bottleneck, blockConfig, smallInputs, dropRate, initChannels,
         inChannels, bnSize) = self.arguments.values()  # plain numbers
        self.efficient = efficient

        layers = blockConfig or [(depth - 4) // (6 if bottleneck else 3)] * 3
        self.nBlocks = len(layers)
        layer = partial(Bottleneck, bnSize=bnSize) if bottleneck else SingleLayer
        nChannels = 2 * growthRate if initChannels is None else initChannels
        window = dict(kernel_size=3, padding=1) if smallInputs else dict(kernel_size=7, stride=2, padding=3)
        self.conv1 = nn.Conv2d(inChannels, nChannels, bias=False, **window)
        if not smallInputs:
            self.bn0 = nn.BatchNorm2d(nChannels)
        for b, n in enumerate(layers, 1):
            block = DenseBlock(*(layer(nChannels + i * growthRate, growthRate, dropRate) for i in range(n)))
            self.add_module(f"dense{b}", block)
            nChannels += n * growthRate
            if b < self.nBlocks:
                nOutChannels = math.floor(nChannels * reduction)
                if nOutChannels < 1:
                    raise ValueError(f"reduction is {reduction}, which leaves none of the {nChannels} channels after "
                                     f"block {b}; valid is {1 / nChannels:.3g} to 1")
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
        self._check_input(x)
        x = self.conv1(x)  # (N, 3, 32, 32) -> (N, 24, 32, 32)
        if not self.arguments["smallInputs"]:
            x = F.max_pool2d(F.relu(self.bn0(x)), kernel_size=3, stride=2, padding=1)
        for b in range(1, self.nBlocks):
            # b = 1: -> (N, 216, 32, 32) -> (N, 108, 16, 16); b = 2: -> (N, 300, 16, 16) -> (N, 150, 8, 8)
            x = self._dense_and_transition(getattr(self, f"dense{b}"), getattr(self, f"trans{b}"), x)
        last = getattr(self, f"dense{self.nBlocks}")
        if path := self._efficient_path(last, [self.bn1], x):
            return efficient_block(last, self.bn1, x, tuple(x.shape[2:]), path).flatten(1)
        return F.relu(self.bn1(last(x))).mean((2, 3))  # -> (N, 342, 8, 8) -> (N, 342)

    def _dense_and_transition(self, block: nn.Module, trans: nn.Module, x: torch.Tensor) -> torch.Tensor:
        after = [trans.bn1, trans, trans.conv1] if type(trans) is Transition else []
        path = self._efficient_path(block, after, x)
        if not path:
            return trans(block(x))
        # without dropout between them, pool(conv(a)) = conv(pool(a)) for a 1x1 conv, which then costs a quarter
        size = (1, 1) if trans.dropRate > 0 else (2, 2)
        x = trans.conv1(efficient_block(block, trans.bn1, x, size, path))
        return F.avg_pool2d(dropout(x, trans.dropRate, True), 2) if trans.dropRate > 0 else x

    def _efficient_path(self, block: nn.Module, after: list[nn.Module], x: torch.Tensor) -> str | None:
        """-> the path's name as in ``DenseBlock.last_path``, or None for the textbook layers; sets ``last_path``"""
        if torch.compiler.is_compiling():
            return None
        path = {True: "efficient", "max": "max", False: None}[self.efficient]
        if path and not can_be_efficient(block, after, x):
            path = None
        if path and self.block_is_compiled:
            path = f"compiled {path}"
        if isinstance(block, DenseBlock):
            block.last_path = path or "textbook"
        return path

    def compile_block(self) -> bool:
        """Compiles the efficient block's element-wise functions with torch.compile, once for all layers.

        A training step computes the same then, up to rounding. On a CPU it takes 0.7 of the time in bfloat16, and
        about as long in float32. Move the network to its device and dtype first, and call this under the autocast of
        the training. The first call in a process takes 15 to 35 seconds, or 5 to 11 if torch's cache on disk has the
        functions. They are compiled again for tiles of one image and 1x1 feature maps, and in another process that
        loads a pickle of the network.

        Returns:
            Whether it worked. Otherwise, for example without a C++ compiler on a CPU, it warns, and the block runs
            uncompiled.

        Raises:
            ValueError: for a network with ``efficient=False``.
        """
        if not self.efficient:
            raise ValueError("efficient is False; valid for compile_block are True and 'max'")
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # a step of a small network compiles everything
            net = DenseNet(5, blockConfig=(2, 2), bottleneck=self.arguments["bottleneck"], efficient=self.efficient)
            images = torch.randn(7, 3, 16, 12).to(self.bn1.weight)
            net.to(self.bn1.weight).block_is_compiled = True
            try:
                if torch._dynamo.config.disable:
                    raise RuntimeError("it is disabled by an environment variable of torch")
                net(images).sum().backward()
                if not net.dense1.last_path.startswith("compiled"):
                    raise RuntimeError(f"on {images.device.type}, in {images.dtype}, the textbook layers run")
            except Exception as error:  # no compiler, a failed link, a cache that cannot be written
                if isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
                    raise
                reason = " ".join(str(error).split())[:160]
                warnings.warn(f"the efficient block runs without torch.compile, which failed: {reason}", stacklevel=2)
                net.block_is_compiled = False
        self.block_is_compiled = net.block_is_compiled
        return self.block_is_compiled

    def _check_input(self, x: torch.Tensor) -> None:
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

    def load_torchvision(self, state_dict: Mapping[str, torch.Tensor], classifier: bool = True) -> None:
        """Loads weights and running statistics of torchvision's network of the same shape, of any version, in place.

        They may be under "state_dict" or "model", and all names may share a prefix ("module."). ``classifier=False``
        keeps this network's ``fc``, for example for other classes, and ignores the other network's.

        Raises:
            ValueError: naming the first entry that is missing, unknown or of another shape; nothing is changed then.
        """
        for key in ("state_dict", "model"):
            if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
                state_dict = state_dict[key]
        if not (isinstance(state_dict, Mapping) and all(torch.is_tensor(value) for value in state_dict.values())):
            raise ValueError(f"the state dict is a {type(state_dict).__name__}; valid is a dict of names and tensors")
        shared = os.path.commonprefix([*map(str, state_dict)])  # noqa: RUF071 (these are no paths)
        start = shared.partition("features.")[0].rfind(".") + 1
        theirs = {}
        for key, value in state_dict.items():
            key = re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", str(key)[start:])  # older files: norm.1 for norm1
            if classifier or not key.startswith(("classifier.", "fc.")):
                theirs[key] = value
        taken = {}
        for name, value in self.state_dict().items():
            if name.startswith("fc.") and not classifier:
                continue
            key = torchvision_name(name)
            if key not in theirs and name.endswith("num_batches_tracked"):  # which older files lack
                continue
            if key not in theirs:
                raise ValueError(f"the state dict has no {key}, which {name} would take: it is another network's")
            taken[name] = found = theirs.pop(key)
            if found.shape != value.shape:
                raise ValueError(f"{key} has shape {tuple(found.shape)}; valid for {name} is {tuple(value.shape)}")
        if theirs:
            raise ValueError(f"the state dict has {next(iter(theirs))}, which this network does not have")
        self.load_state_dict(taken, strict=False)

    def torchvision_state_dict(self) -> dict[str, torch.Tensor]:
        """-> the state dict under torchvision's names, for its network of the same shape"""
        return {torchvision_name(name): value for name, value in self.state_dict().items()}


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


def checked_arguments(**arguments) -> dict[str, Any]:
    """-> DenseNet's arguments as Python's numbers. Raises ValueError, naming an impossible value and the valid ones."""
    a = {name: as_python_number(value) for name, value in arguments.items()}
    counts = ("growthRate", "depth", "nClasses", "initChannels", "inChannels", "bnSize")
    for names, kind, is_valid in (
            (counts, "whole numbers from 1", lambda value: type(value) is int and value > 0),
            (("bottleneck", "smallInputs"), "True and False", lambda value: isinstance(value, bool)),
            (("reduction", "dropRate"), "numbers", lambda value: isinstance(value, (int, float)))):
        for name in names:
            if not is_valid(a[name]) and not (a[name] is None and name in ("depth", "initChannels")):
                raise ValueError(f"{name} is {reprlib.repr(a[name])}; valid are {kind}")
    if isinstance(a["blockConfig"], Iterable):
        a["blockConfig"] = [*map(as_python_number, a["blockConfig"])]
    depth, blockConfig, bottleneck = a["depth"], a["blockConfig"], a["bottleneck"]
    if depth is not None and blockConfig is not None:
        raise ValueError(f"depth is {depth} and blockConfig {blockConfig}; valid is one of them")
    are_counts = isinstance(blockConfig, list) and all(type(n) is int and n > 0 for n in blockConfig)
    if blockConfig is not None and not (blockConfig and are_counts):
        raise ValueError(f"blockConfig is {blockConfig}; valid are whole numbers from 1, one for each block")
    step = 6 if bottleneck else 3
    if depth is not None and (depth < 4 + step or (depth - 4) % step):
        below = max(1, (depth - 4) // step) * step + 4
        nearest = f"{below}" if depth < below else f"{below} and {below + step}"
        kind = "with" if bottleneck else "without"
        raise ValueError(f"depth is {depth}; valid {kind} bottleneck is {step}n + 4, nearest {nearest}")
    if not 0 < a["reduction"] <= 1:
        raise ValueError(f"reduction is {a['reduction']}; valid is above 0 and at most 1")
    if not 0 <= a["dropRate"] < 1:
        raise ValueError(f"dropRate is {a['dropRate']}; valid is from 0 to below 1")
    return a


def as_python_number(value: Any) -> Any:
    """-> a number of any library as Python's int, float or bool; any other value unchanged"""
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's and torch's scalars
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def imagenet(growthRate: int, blockConfig: Sequence[int], nClasses: int = 1000, **arguments) -> DenseNet:
    """DenseNet-BC for ImageNet (paper, table 1; densenet161: official models); ``arguments``: see DenseNet."""
    return DenseNet(growthRate, nClasses=nClasses, blockConfig=blockConfig, smallInputs=False, **arguments)


densenet121 = partial(imagenet, 32, (6, 12, 24, 16))  # 7,978,856 parameters
densenet169 = partial(imagenet, 32, (6, 12, 32, 32))  # 14,149,480
densenet201 = partial(imagenet, 32, (6, 12, 48, 32))  # 20,013,928
densenet161 = partial(imagenet, 48, (6, 12, 36, 24))  # 28,681,000


def load(file: str | os.PathLike | BinaryIO, device: str | torch.device = "cpu") -> DenseNet:
    """-> the trained network of a checkpoint that train.py wrote, in evaluation mode

    It has the attributes ``mean`` and ``std`` (inChannels, 1, 1), which normalise images in [0, 1]: (images - mean) /
    std; and ``classes``, the names of its outputs.

    Raises:
        ValueError: if the file is damaged or not such a checkpoint.
        OSError: if it cannot be read.
    """
    checkpoint = read_checkpoint(file)
    if missing := {"arguments", "model", "mean", "std", "classes"} - checkpoint.keys():
        raise ValueError(f"{file} is not a checkpoint of train.py: it has no {min(missing)}")
    try:
        arguments, model = checkpoint["arguments"], checkpoint["model"]
        layers = sum(arguments.get("blockConfig") or [arguments.get("depth") or 0])
        stored = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.values()}.values())
        size = sum(tensor.nbytes for tensor in model.values())
        if layers > len(model) or size > stored:
            raise ValueError(f"it declares {layers} layers in {size} bytes, but has {len(model)} tensors in {stored}")
        with torch.device("meta"):  # takes no memory, whatever is declared
            net = DenseNet(**arguments)
        names = checkpoint["classes"]
        if len(names) != net.arguments["nClasses"] or any(type(name) is not str for name in names):
            raise ValueError(f"classes are not the names of {net.arguments['nClasses']} classes")
        net.load_state_dict(model, assign=True)
        for name in ("mean", "std"):
            value = torch.tensor(checkpoint[name], dtype=torch.float32)
            net.register_buffer(name, value.view(net.conv1.in_channels, 1, 1), persistent=False)
        net.to("cpu", torch.float32)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is not a checkpoint of this train.py ({reason})") from None
    net.classes = checkpoint["classes"]
    return net.to(device).eval()


class ForeignFile(ValueError):
    """An undamaged file that is no checkpoint of train.py."""


def read_checkpoint(file: str | os.PathLike | BinaryIO) -> dict:
    """-> the dict that train.py saved, on the CPU. Checks each byte by its checksum; never runs code of the file.

    Raises: as ``load``; ForeignFile if the file is undamaged but something else.
    """
    try:
        with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened:
            with zipfile.ZipFile(opened) as archive:  # torch.load ignores the checksums
                parts = archive.infolist()
                if any(part.compress_type != zipfile.ZIP_STORED or part.external_attr & 16 for part in parts):
                    raise ValueError("it has compressed parts or folders")  # torch.load reads a folder as zeros
                if sum(part.file_size for part in parts) > opened.seek(0, os.SEEK_END):
                    raise ValueError("its parts overlap")
                if bad := archive.testzip():
                    raise ValueError(f"wrong checksum of {bad}")
            opened.seek(0)
            checkpoint = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ForeignFile(f"{file} is not a checkpoint of train.py: it holds other objects than tensors and plain "
                          "values, and loading those could run code") from None
    except Exception as error:  # zipfile's, zlib's, struct's, torch's: a flipped bit can cause any of them
        if isinstance(error, (OSError, MemoryError)) and getattr(error, "errno", 0) not in (errno.EIO, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is damaged, or not a checkpoint of train.py ({reason})") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else checkpoint
    if type(found) is not int or found != 1:
        found = found if isinstance(found, int | None) else type(found).__name__
        raise ForeignFile(f"{file} is not a checkpoint of this train.py: its format is {found}; valid is 1")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------
# The efficient dense block
# ----------------------------------------------------------------------------------------------------------------

TILE = 16384  # pixels of a tile on a CPU: smaller ones fit nearer caches, larger ones need fewer calls
COMPILE_OPTIONS = {"split_reductions": False}  # on a GPU a sum over H and W is one kernel instead of two


def efficient_block(block: DenseBlock, norm: nn.BatchNorm2d, x: torch.Tensor, pool: tuple[int, int],
                    path: str) -> torch.Tensor:
    """-> ``avg_pool2d(relu(norm(block(x))), pool)``; updates the running statistics of every batch norm"""
    bottleneck = isinstance(block[0], Bottleneck)
    parameters = []
    for layer in block:
        parameters += layer.bn1.weight, layer.bn1.bias, layer.conv1.weight
        if bottleneck:
            parameters += layer.bn2.weight, layer.bn2.bias, layer.conv2.weight
    spec = BlockSpec(bottleneck, norm.eps, block[0].dropRate, pool, path.endswith("max"), path.startswith("compiled"),
                     activation_dtype(x, norm.weight))
    # the block casts by itself; cache_enabled as in the backward pass: torch.compile compiles for this state, too
    with torch.autocast(x.device.type, enabled=False, cache_enabled=True):
        out, mean, var, *inner = EfficientBlock.apply(x, spec, *parameters, norm.weight, norm.bias)
    m = x.numel() // x.shape[1]
    var, *inner_variances = torch._foreach_mul([var, *inner[1::2]], m / (m - 1))  # unbiased
    outer = [*(layer.bn1 for layer in block), norm]
    update_running_statistics(outer, [mean] * len(outer), [var] * len(outer))
    if bottleneck:
        update_running_statistics([layer.bn2 for layer in block], inner[::2], inner_variances)
    return out


@torch.no_grad()
def update_running_statistics(norms: list[nn.BatchNorm2d], means: Sequence[torch.Tensor],
                              variances: Sequence[torch.Tensor]) -> None:
    """Updates all norms together: on a GPU three launches instead of three per norm."""
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    for name, new in (("running_mean", means), ("running_var", variances)):
        running = [getattr(norm, name) for norm in norms]
        new = [value[:len(old)] for value, old in zip(new, running, strict=True)]
        torch._foreach_lerp_(running, new, norms[0].momentum)


class BlockSpec(NamedTuple):
    bottleneck: bool
    eps: float
    dropRate: float
    pool: tuple[int, int]
    recompute: bool  # the backward pass repeats the bottleneck's 1x1 convolution: its output is not kept
    compiled: bool  # by DenseNet.compile_block
    dtype: torch.dtype  # of activations; statistics and gradients of parameters have the parameters' dtype


class EfficientBlock(torch.autograd.Function):
    """A dense block in training mode, with the batch norm, ReLU and average pooling that follow it.

    Channel c of the block has one batch mean and variance, however many layers normalise it. Hence

        xhat_c = (x_c - mean_c) rstd_c              once per channel, when the channel is made
        a_l    = relu(gamma_l xhat[:C_l] + beta_l)  element by element; recomputed when needed, never kept
        h_l    = W_l a_l                            the layer's first convolution

    and backward, where G is the gradient of xhat, the sum over all layers that read xhat:

        da_l     = W_l^T dh_l, zero where a_l is zero
        dbeta_l  = sum(da_l),  dgamma_l = sum(da_l xhat)
        G[:C_l] += gamma_l da_l
        dx_c     = rstd_c (G_c - mean(G_c) - xhat_c mean(G_c xhat_c))   once per channel

    The two means need no pass over G: sum(G_c) and sum(G_c xhat_c) are the sums over l of gamma_l dbeta_l and of
    gamma_l dgamma_l. A bottleneck's second batch norm is the same with a single reader. Kept for the backward pass:
    xhat, each bottleneck's normalised 4k channels (not with ``recompute``), dropout's masks and the parameters.

    Schlüter shared xhat before, with a scale and shift per layer (Lasagne/Recipes, densenet_fast.py, 2016); Jung et
    al. split and fused batch norm on a CPU (arXiv 1807.01702). New are the exact backward pass in memory linear in
    depth without recomputed convolutions, and correct running statistics.

    Tensors are channels_last, where the first C_l channels are a strided matrix that needs no copy. Each layer is
    computed in tiles of a few images, so that intermediate results stay in a CPU's cache. Between the convolutions run
    the element-wise functions of a tile, further below, as they are or compiled.
    """

    @staticmethod
    def forward(ctx, x, spec, *parameters):
        """-> pooled activations (N, C, H', W'); then, without gradient, mean and biased variance of the block's
        channels, and for each bottleneck those of its inner channels"""
        f, (*layers, (gamma, beta)) = tile_functions(spec.compiled), split_layers(parameters, spec)
        x = x.contiguous(memory_format=torch.channels_last)  # one layout, for which the functions are compiled once
        c, k = x.shape[1], layers[0][-1].shape[0]
        xhat = torch.empty((len(x), c + k * len(layers), *x.shape[2:]), dtype=spec.dtype, device=x.device,
                           memory_format=torch.channels_last)
        statistics = [normalise(f, tiles(x), spec.eps, out=tiles(xhat[:, :c]))]  # mean, variance, rstd of new channels
        kept, inner = [], []  # kept is a stack: the backward pass pops from its end
        for layer in layers:
            h = drop(affine_relu_conv(f, tiles(xhat[:, :c]), *layer[:3]), spec.dropRate, kept)
            if spec.bottleneck:
                h, (mean2, var2, rstd2) = batch_statistics(f, h, spec.eps)
                inner += mean2, var2
                kept += [mean2] if spec.recompute else h
                kept.append(rstd2)
                a = (f.standardise_affine_relu(tile, mean2, rstd2, *layer[3:5]) for tile in h)  # overwrites h with xhat
                h = drop((conv(tile, layer[5]) for tile in a), spec.dropRate, kept)
            statistics.append(normalise(f, h, spec.eps, out=tiles(xhat[:, c:c + k])))
            c += k
        mean, var, rstd = map(torch.cat, zip(*statistics, strict=True))
        out = joined([F.avg_pool2d(f.affine_relu(hat, gamma, beta), spec.pool) for hat in tiles(xhat)])

        ctx.spec, ctx.nParameters = spec, len(parameters)
        ctx.save_for_backward(*parameters, xhat, rstd, *kept)
        ctx.mark_non_differentiable(mean, var, *inner)
        ctx.set_materialize_grads(False)  # otherwise zeros are made as gradients of these: 102 kernels in BC 100-12
        return out, mean, var, *inner

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:  # a function that reads the block has no gradient for it
            return (None,) * (2 + ctx.nParameters)
        batched = torch._C._functorch.is_legacy_batchedtensor(dout) or torch._C._functorch.is_batchedtensor(dout)
        if torch.is_grad_enabled() or batched:
            raise RuntimeError("the efficient dense block can be differentiated only once, and for one gradient at a "
                               "time; for second derivatives (create_graph=True) and batched ones (is_grads_batched, "
                               "vectorize) build the network with efficient=False")
        with torch.autocast(dout.device.type, enabled=False, cache_enabled=True):
            return EfficientBlock.gradients(ctx.spec, dout, ctx.saved_tensors, ctx.nParameters)

    @staticmethod
    def gradients(spec, dout, saved, nParameters):
        f, (*layers, (gamma, beta)) = tile_functions(spec.compiled), split_layers(saved[:nParameters], spec)
        xhat, rstd, *kept = saved[nParameters:]
        m, k, n = xhat.numel() // xhat.shape[1], layers[0][-1].shape[0], len(tiles(xhat))
        nMasks = n if spec.dropRate > 0 else 0  # masks that each dropout has put onto the stack

        G = torch.empty_like(xhat, dtype=gamma.dtype)
        sums = gamma.new_zeros(2, len(gamma))  # of G and of G xhat, over N, H and W
        grads = outer_backward(f, partial(pool_backward, spec.pool), dout.tensor_split(n), tiles(xhat), gamma, beta,
                               tiles(G), sums, is_first=True)
        for layer in reversed(layers):
            c = len(layer[0])
            new = slice(c, c + k)
            dh = normalise_backward(f, tiles(G[:, new]), tiles(xhat[:, new]), rstd[new], sums[:, new], m)
            dh = undrop(dh, spec.dropRate, pop_last(kept, nMasks))
            if spec.bottleneck:
                rstd2 = kept.pop()
                if spec.recompute:
                    mean2, masks = kept.pop(), kept[len(kept) - nMasks:]  # not popped: dh needs them, too
                    h = undrop(affine_relu_conv(f, tiles(xhat[:, :c]), *layer[:3]), spec.dropRate, masks)
                    h = [f.standardise(tile, mean2, rstd2, tile) for tile in h]
                else:
                    h = pop_last(kept, n)
                dh, layer_grads = inner_backward(f, partial(conv_backward, layer[5]), dh, h, rstd2, *layer[3:5], m)
                grads = layer_grads + grads
                dh = undrop(dh, spec.dropRate, pop_last(kept, nMasks))
            grads = outer_backward(
                f, partial(conv_backward, layer[2]), dh, tiles(xhat[:, :c]), *layer[:2], tiles(G[:, :c]),
                sums[:, :c].data, is_first=False) + grads  # written to, hence no view: see tiles
        dx = normalise_backward(f, tiles(G[:, :c]), tiles(xhat[:, :c]), rstd[:c], sums[:, :c], m)
        grads = [grad.data for grad in as_dtype(grads, gamma.dtype)]  # no views: they could not be changed in place
        return joined([*dx]), None, *grads


def split_layers(parameters, spec):
    """-> (gamma, beta, weight) of each layer, with bottleneck twice; at the end (gamma, beta) of the last norm"""
    size = 6 if spec.bottleneck else 3
    # detached: torch.compile takes the shape of each nn.Parameter as a constant, and would compile for every layer
    parameters = [p.detach() for p in parameters]
    parameters[2::3] = as_dtype(parameters[2::3], spec.dtype)
    return [parameters[i:i + size] for i in range(0, len(parameters), size)]


def as_dtype(tensors, dtype):
    """-> the tensors, converted if they are of another dtype; on a GPU all by a few kernels"""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(converted, tensors)
    return converted


def tiles(x):
    """-> the tensor in tiles of whole images; on a GPU, which gains nothing by tiles, in one"""
    n, _, height, width = x.shape
    parts = x.tensor_split(-(-n // max(1, TILE // (height * width))) if x.device.type == "cpu" else 1)
    return [part.data for part in parts]  # no views: torch.compile would compile again for each shape of their base


def joined(parts):
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def pop_last(stack, n):
    """Removes the last n tensors. -> these, in the order in which they were added"""
    popped = stack[len(stack) - n:]
    del stack[len(stack) - n:]
    return popped


# --- element-wise functions of one tile, run as they are or compiled ---

def affine_relu(xhat, gamma, beta):
    return torch.addcmul(column(beta), xhat, column(gamma)).to(xhat.dtype).relu_()


def moments(x, eps):
    """-> mean, biased variance and rstd = 1 / sqrt(variance + eps) over N, H and W, each (C,)"""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    means = x.mean((2, 3), keepdim=True)  # of each image: compiled, its deviations are read from the cache
    variances = (x - means).pow_(2).mean((2, 3))
    means = means.flatten(1)
    mean = means.mean(0)
    var = (variances + (means - mean).pow_(2)).mean(0)
    return mean, var, (var + eps).rsqrt()


def standardise(x, mean, rstd, out):
    """Writes xhat to ``out``, which may be x."""
    return out.copy_(torch.addcmul(column(-mean * rstd), x, column(rstd)))


def standardise_affine_relu(x, mean, rstd, gamma, beta):
    """Replaces x by xhat. -> relu(gamma xhat + beta)"""
    return affine_relu(standardise(x, mean, rstd, out=x), gamma, beta)


def standardise_backward(G, xhat, rstd, sums, m):
    """-> rstd (G - mean(G) - xhat mean(G xhat)); ``sums``: (2, C), of G and of G xhat, over m values per channel"""
    shift, slope = sums * (rstd / -m)
    return torch.addcmul(column(shift), G, column(rstd)).addcmul_(xhat, column(slope)).to(xhat.dtype)


def affine_relu_backward(da, a, xhat, gamma, beta):
    """-> dbeta and dgamma, the sums of da and of da xhat, (2, C). Uncompiled, da becomes zero where a is zero."""
    da = relu_backward(da, a, xhat, gamma, beta).to(gamma.dtype)
    return channel_sums(da, da * xhat)


def standardise_affine_relu_backward(da, xhat, rstd, gamma, beta, sums, m, is_masked):
    """-> the gradient of standardise_affine_relu's x; ``sums``: what affine_relu_backward returned, over all tiles;
    ``is_masked``: da is zero where a is, since affine_relu_backward has changed it in place"""
    if not is_masked:
        da = torch.where(affine_relu(xhat, gamma, beta) <= 0, 0, da)
    return standardise_backward(da, xhat, rstd * gamma, sums, m)


def affine_relu_backward_to_G(da, a, xhat, gamma, beta, G, sums, is_first):
    """As affine_relu_backward. Adds gamma da to G, or writes it there if ``is_first``; adds its sums to ``sums``."""
    da = relu_backward(da, a, xhat, gamma, beta).to(gamma.dtype)
    if is_first:
        torch.mul(da, column(gamma), out=G)
    else:
        G.addcmul_(da, column(gamma))
    new = channel_sums(da, da * xhat)
    sums.addcmul_(new, gamma)
    return new


def relu_backward(da, a, xhat, gamma, beta):
    """-> da, zero where a is zero. Compiled, it makes a again from xhat, which is read anyway. Uncompiled, that would
    be one more pass over memory: it reads a, and overwrites da."""
    if torch.compiler.is_compiling():
        return torch.where(affine_relu(xhat, gamma, beta) <= 0, 0, da)
    return torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da)


def channel_sums(x, y):
    """-> the sums of both over N, H and W, (2, C). Compiled, one sum over all three takes ten times as long."""
    return torch.stack((x.sum((2, 3)), y.sum((2, 3)))).sum(1)


def column(v):
    """(C,) -> (C, 1, 1), which broadcasts over (N, C, H, W)"""
    return v.view(-1, 1, 1)


@cache
def tile_functions(compiled):
    """-> the functions above, by name, and ``compiled``. Each is compiled for every dtype and kind of tile: a slice of
    channels or all, from channel 0 or not, one image or more, one pixel or more; up to torch's limit of 8."""
    functions = (affine_relu, moments, standardise, standardise_affine_relu, standardise_backward, affine_relu_backward,
                 standardise_affine_relu_backward, affine_relu_backward_to_G)
    by_name = {f.__name__: f for f in functions}
    if compiled:
        by_name = {name: torch.compile(f, dynamic=True, options=COMPILE_OPTIONS) for name, f in by_name.items()}
    return SimpleNamespace(compiled=compiled, **by_name)


# --- these take all tiles of a tensor; those that yield tiles pass each one on while it is in the cache ---

def batch_statistics(f, x, eps):
    """-> the tiles of x; their mean, biased variance and rstd, each (C,)"""
    parts, results = [], []
    for tile in x:
        parts.append(tile)
        results.append(f.moments(tile, eps))
    if len(parts) == 1:
        return parts, results[0]
    means, variances, _ = map(torch.stack, zip(*results, strict=True))  # (tiles, C)
    share = means.new_tensor([[len(tile)] for tile in parts]) / sum(map(len, parts))
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)  # a tile's variance is about its own mean
    return parts, (mean, var, (var + eps).rsqrt())


def normalise(f, x, eps, out):
    """Writes xhat to ``out``. -> mean, biased variance and rstd, each (C,)"""
    parts, (mean, var, rstd) = batch_statistics(f, x, eps)
    for tile, hat in zip(parts, out, strict=True):
        f.standardise(tile, mean, rstd, hat)
    return mean, var, rstd


def normalise_backward(f, G, xhat, rstd, sums, m):
    """Yields dx by EfficientBlock's last formula."""
    return (f.standardise_backward(g, hat, rstd, sums, m) for g, hat in zip(G, xhat, strict=True))


def outer_backward(f, vjp, dout, xhat, gamma, beta, G, sums, is_first):
    """Backward of a = relu(gamma xhat + beta) and of the function that reads a: ``vjp(dout, a)``, its vector-Jacobian
    product, returns da, and dweight if it has a weight. Adds gamma da to G, or writes it there if ``is_first``.

    -> [dgamma, dbeta, dweight]
    """
    parts = []
    for d, hat, g in zip(dout, xhat, G, strict=True):
        a = f.affine_relu(hat, gamma, beta)
        da, *dweight = vjp(d, a)
        parts.append((f.affine_relu_backward_to_G(da, a, hat, gamma, beta, g, sums, is_first), *dweight))
    (dbeta, dgamma), *dweight = total(parts, gamma.dtype)
    return [dgamma, dbeta, *dweight]


def inner_backward(f, vjp, dout, xhat, rstd, gamma, beta, m):
    """The same for a bottleneck's second batch norm, which alone reads its xhat.

    -> the gradient of its input, yielded tile by tile; [dgamma, dbeta, dweight]
    """
    parts, gradients = [], []
    for d, hat in zip(dout, xhat, strict=True):
        a = f.affine_relu(hat, gamma, beta)
        da, dweight = vjp(d, a)
        parts.append((f.affine_relu_backward(da, a, hat, gamma, beta), dweight))
        gradients.append(da)
    sums, dweight = total(parts, gamma.dtype)
    dx = (f.standardise_affine_relu_backward(da, hat, rstd, gamma, beta, sums, m, not f.compiled)
          for da, hat in zip(gradients, xhat, strict=True))
    return dx, [sums[1], sums[0], dweight]


def total(parts, dtype):
    """-> each value's sum over the tiles, in this dtype if there are several: bfloat16 would round each addition"""
    if len(parts) == 1:
        return parts[0]
    return [reduce(torch.add, [value.to(dtype) for value in values]) for values in zip(*parts, strict=True)]


def affine_relu_conv(f, xhat, gamma, beta, weight):
    """Yields h = W relu(gamma xhat + beta)."""
    return (conv(f.affine_relu(hat, gamma, beta), weight) for hat in xhat)


def conv(a, weight):
    return F.conv2d(a, weight, padding=weight.shape[-1] // 2)


def conv_backward(weight, dh, a):
    padding = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        dh, a, weight, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, (True, True, False))[:2]


def pool_backward(size, dout, a):
    return (torch.ops.aten.avg_pool2d_backward(dout, a, size, size, (0, 0), False, True, None),)


def drop(h, p, kept):
    """Yields h after dropout; adds the masks, one per tile, to the stack ``kept``."""
    for tile in h:
        if p > 0:
            kept.append(F.dropout(torch.ones_like(tile), p).bool())
            tile = tile * kept[-1] / (1 - p)
        yield tile


def undrop(dh, p, masks):
    """-> the gradient of dropout's input, tile by tile"""
    return (tile * mask / (1 - p) for tile, mask in zip(dh, masks, strict=True)) if masks else dh


# --- where the efficient block is exact: an allow-list -----------------------------------------------------------

def can_be_efficient(block: DenseBlock, after: list[nn.Module], x: torch.Tensor) -> bool:
    """Whether the efficient block computes exactly what ``block`` and the modules ``after`` it do: they are the paper's
    modules, unmodified, in training mode, on a plain tensor, and nothing traces or hooks them. ``after`` is [norm], or
    [transition.bn1, transition, transition.conv1], or [] for a transition of another type."""
    if (type(block) is not DenseBlock or not len(block) or not after or type(x) is not torch.Tensor
            or x.device.type not in ("cpu", "cuda") or x.numel() <= x.shape[1] or nn_module._has_any_global_hook()
            # torch.func, forward-mode differentiation and torch.jit.trace see only torch's own operations
            or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
            or torch.jit.is_tracing()):
        return False
    norm, layers, kind = after[0], [*block], type(block[0])
    if kind not in (Bottleneck, SingleLayer) or any(type(layer) is not kind for layer in layers):
        return False
    modules = [block, *after]
    norms, convs = [norm], [(conv, 1) for conv in after[2:]]
    for layer in layers:
        modules += layer, *layer.children()
        norms += [layer.bn1, layer.bn2] if kind is Bottleneck else [layer.bn1]
        convs += [(layer.conv1, 1), (layer.conv2, 3)] if kind is Bottleneck else [(layer.conv1, 3)]
    return (all(is_unmodified(module) for module in modules)
            and all(is_plain_norm(n, norm) for n in norms) and all(is_plain_conv(conv, size) for conv, size in convs)
            and len({layer.dropRate for layer in layers}) == 1
            and all(p.device == x.device and p.dtype == norm.weight.dtype for n in norms for p in n.parameters())
            and all(c.weight.device == x.device and c.weight.dtype == norm.weight.dtype for c, _ in convs)
            and norm.weight.dtype in (torch.float32, torch.float64)
            and x.dtype in (norm.weight.dtype, activation_dtype(x, norm.weight)))


def activation_dtype(x: torch.Tensor, parameter: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and parameter.dtype == torch.float32:
        return torch.get_autocast_dtype(x.device.type)
    return parameter.dtype


def is_unmodified(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (module.training and not any(hooks) and "forward" not in vars(module)
            and module._compiled_call_impl is None)


def is_plain_norm(norm: nn.Module, like: nn.BatchNorm2d) -> bool:
    return (type(norm) is nn.BatchNorm2d and type(norm.weight) is nn.Parameter and type(norm.bias) is nn.Parameter
            and norm.track_running_stats and norm.running_mean is not None and norm.eps == like.eps
            and norm.momentum is not None and norm.momentum == like.momentum)


def is_plain_conv(conv: nn.Module, size: int) -> bool:
    return (type(conv) is nn.Conv2d and type(conv.weight) is nn.Parameter and conv.bias is None
            and conv.kernel_size == (size, size) and conv.padding == (size // 2, size // 2)
            and conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros")
