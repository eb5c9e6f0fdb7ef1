"""What the tools share: a network's layers and backward graph, the hidden states and gradients of one pass,
inputs of ReLU near zero, torchvision's network, the path of a result."""

import argparse
import copy
import os
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from densenet import Bottleneck, DenseNet, SingleLayer, Transition, torchvision_name
from lib.cli import Failure

EFFICIENT = {"no": False, "yes": True, "max": "max"}  # a flag's value -> DenseNet's argument
SHIFT = 0.05  # in standard deviations: the most that settle_kinks moves an output of batch norm


def file(text: str) -> str:
    """An argparse type: the path of a file."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}; there is no such file")
    return text


# --- a network --------------------------------------------------------------------------------------------------

def layers_of(net: DenseNet) -> list[tuple[str, nn.Module]]:
    """-> names and modules of all dense layers and transitions, conv1, bn0, bn1 and fc, in order of computation"""
    return [(name, module) for name, module in net.named_modules()
            if isinstance(module, (Bottleneck, SingleLayer, Transition)) or name in ("conv1", "bn0", "bn1", "fc")]


def describe(net: DenseNet) -> str:
    """Such as "DenseNet-BC, L=100, k=12": B is for bottleneck, C for compression, L the depth, k the growth rate."""
    a = net.arguments
    letters = ("B" if a["bottleneck"] else "") + ("C" if a["reduction"] < 1 else "")
    name = f"DenseNet-{letters}" if letters else "DenseNet"
    size = f"L={a['depth']}" if a["depth"] else f"blocks of {', '.join(map(str, a['blockConfig']))} layers"
    return f"{name}, {size}, k={a['growthRate']}"


def torchvision_net(net: DenseNet) -> nn.Module:
    """-> torchvision's DenseNet, an independent implementation, with the weights of ``net``

    Raises:
        ValueError: if torchvision's DenseNet cannot be this network.
    """
    a = net.arguments
    convs = [module.conv1 for module in net.modules() if isinstance(module, Transition)]
    if not a["bottleneck"] or any(conv.out_channels != conv.in_channels // 2 for conv in convs):
        raise ValueError("torchvision's DenseNet always has bottlenecks and reduction 0.5; valid for this network are "
                         "--against plain, cuda and cudnn-off")
    blocks = tuple(len(net.get_submodule(f"dense{b}")) for b in range(1, net.nBlocks + 1))
    channels = net.conv1.out_channels
    theirs = torchvision.models.DenseNet(a["growthRate"], blocks, channels, a["bnSize"], num_classes=a["nClasses"])
    theirs.features.conv0 = copy.deepcopy(net.conv1)
    if a["smallInputs"]:
        for name in ("norm0", "relu0", "pool0"):
            setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict(net.torchvision_state_dict())
    return theirs


def operations(output: torch.Tensor) -> list[Node]:
    """-> each node of the backward graph once, breadth first from that of ``output``"""
    found = [output.grad_fn]
    seen = set(found)
    for operation in found:  # the list grows in the loop; a recursion would reach Python's limit at about depth 250
        for source, _ in operation.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                found.append(source)
    return found


def check_efficient(net: DenseNet, output: torch.Tensor) -> None:
    """Raises Failure if the blocks were not computed as ``net.efficient`` asks.

    Without this, a check of the efficient block could pass although only the textbook's layers ran.
    """
    n = sum(node.name() == "EfficientBlockBackward" for node in operations(output))
    if n != (net.nBlocks if net.efficient else 0):
        raise Failure(f"{n} of {net.nBlocks} dense blocks were computed by the efficient block although efficient "
                      f"is {net.efficient!r}, so the check says nothing")


@torch.no_grad()
def settle_kinks(module: nn.Module, x: torch.Tensor) -> float:
    """Changes the biases of batch norm a little, in place, so that no ReLU has an input near zero.

    ReLU has no derivative at zero. If the step of a numerical derivative, or the rounding of float32, moves an input
    across zero, the gradient jumps: two correct results then differ by about 1e-2, which would hide real errors.
    Therefore each bias is chosen so that zero lies in the middle of the widest gap between its channel's values. No
    value moves by more than SHIFT standard deviations.

    Args:
        module: in training mode. One forward pass changes its batch norms one after the other.
        x: the module's input, (N, C, H, W).

    Returns:
        The smallest absolute value among the inputs of all ReLUs.
    """
    distances = []

    def shift(norm: nn.BatchNorm2d, _inputs, out: torch.Tensor) -> torch.Tensor:
        values = out.transpose(0, 1).flatten(1)  # (C, N * H * W)
        window = SHIFT * values.std(1, keepdim=True)
        values = torch.cat((-window, values.clamp(-window, window), window), 1).sort(1).values
        gap, index = values.diff(dim=1).max(1, keepdim=True)
        middle = values.gather(1, index) + gap / 2
        norm.bias -= middle.squeeze(1)
        distances.append(gap.min().item() / 2)
        return out - middle[:, :, None]  # the output with the new bias, for the layers that follow

    hooks = [m.register_forward_hook(shift) for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    module(x)
    for hook in hooks:
        hook.remove()
    return min(distances)


# --- one pass ---------------------------------------------------------------------------------------------------

class Side(NamedTuple):
    """One way to compute the network."""
    name: str
    torchvision: bool = False
    efficient: bool | str = False  # of our network
    device: str = "cpu"
    cudnn: bool = True


Record = dict[tuple[str, str], torch.Tensor]  # (kind, name) of compare_grads.Row -> the tensor, as float64 on the CPU


def record(side: Side, net: DenseNet, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> Record:
    """-> every hidden state, running statistic and gradient of one forward and backward pass in training mode

    A dense layer's state are its new channels alone, which is what torchvision's layers return.

    Args:
        net: its weights are used; it stays as it is.
        images: (N, C, H, W), labels: int64 (N,)

    Raises:
        Failure: if the blocks were not computed as the side asks.
    """
    model = torchvision_net(net) if side.torchvision else copy.deepcopy(net)
    model.train().to(side.device, dtype)
    for buffer in model.buffers():
        buffer.zero_()  # after the pass they are momentum times the batch statistics
    their_name = torchvision_name if side.torchvision else str
    images = images.to(side.device, dtype).detach().requires_grad_()
    found, convolutions = {}, Convolutions()

    def put(kind: str, name: str, value: torch.Tensor) -> None:
        found[kind, name] = value.detach().to("cpu", torch.float64, copy=True)

    def put_state(name: str, value: torch.Tensor, channels: slice = slice(None)) -> None:
        put("state", name, value[:, channels])
        value.register_hook(lambda gradient: put("gradient", name, gradient[:, channels]))

    def watch(name: str, module: nn.Module, channels: slice) -> None:
        def hook(_, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if name == "fc":
                put_state("features", inputs[0])
            put_state(name, output, channels)
        module.register_forward_hook(hook)

    for name, _ in layers_of(net):
        module = model.get_submodule(their_name(name))
        if not side.efficient or name in ("conv1", "bn0", "fc"):
            is_dense = name.startswith("dense")
            watch(name, module, slice(-net.arguments["growthRate"], None) if is_dense else slice(None))
        elif name != "bn1":  # hooks would switch the efficient block off
            convolutions.names[getattr(module, "conv2", module.conv1).weight.data_ptr()] = name
    if not side.torchvision:
        model.efficient = side.efficient
    with torch.backends.cudnn.flags(enabled=side.cudnn, allow_tf32=False):  # TF32 would exceed the limits
        with convolutions:
            output = model(images)
        output = F.log_softmax(output, 1) if side.torchvision else output
        if not side.torchvision:
            check_efficient(model, output)
        loss = F.nll_loss(output, labels.to(side.device))
        with convolutions:
            loss.backward()
    for (kind, name), tiles in convolutions.tiles.items():
        put(kind, name, torch.cat(tiles))
    put("state", "output", output)
    put("state", "loss", loss)
    put("gradient", "images", images.grad)
    for name, p in net.named_parameters():
        theirs = model.get_parameter(their_name(name))
        put("parameter", name, torch.zeros_like(p) if theirs.grad is None else theirs.grad)  # missing: a difference
    for name, _ in net.named_buffers():
        put("statistic", name, model.get_buffer(their_name(name)))
    return found


class Convolutions(TorchDispatchMode):
    """A context that keeps what the convolutions of some weights return and the gradients that they get, tile by tile.

    The states of an efficient block are seen this way: hooks on its modules would switch it off.
    """

    def __init__(self):
        super().__init__()
        self.names: dict[int, str] = {}  # a weight's data_ptr() -> the layer's name
        self.tiles: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten.convolution.default and args[1].data_ptr() in self.names:
            self.tiles["state", self.names[args[1].data_ptr()]].append(result.clone())
        if function is torch.ops.aten.convolution_backward.default and args[2].data_ptr() in self.names:
            self.tiles["gradient", self.names[args[2].data_ptr()]].append(args[0].clone())
        return result
