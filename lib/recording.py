"""Records every hidden state, running statistic and gradient of one forward and backward pass of a network."""

import copy
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer, Transition, torchvision_name
from lib.faults import injected, target_of
from lib.layers import check_path, layers_of, operations, parts_of, set_path
from lib.torchvision_net import torchvision_net


class Side(NamedTuple):
    """One way to compute the network."""
    name: str
    torchvision: bool = False
    path: str = "textbook"  # of our dense blocks, see layers.PATHS and layers.COMPILED_PATHS
    dtype: torch.dtype = torch.float32
    autocast: bool = False  # to bfloat16
    device: str = "cpu"
    cudnn: bool = True
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False  # the whole network, by torch.compile


class Record(dict):
    """The tensors of one forward and backward pass, copied to the CPU, by (kind, name) of compare_grads.Key."""

    def put(self, kind: str, name: str, value: torch.Tensor) -> None:
        self[kind, name] = value.detach().to("cpu", copy=True)

    def put_state(self, name: str, value: torch.Tensor, channels: slice = slice(None)) -> None:
        """Records ``channels`` of a hidden state now, and their gradient during the backward pass."""
        self.put("state", name, value[:, channels])
        value.register_hook(lambda grad: self.put("gradient", name, grad[:, channels]))


def record(side: Side, net: DenseNet, images: torch.Tensor, labels: torch.Tensor, fault: str | None) -> Record:
    """Computes one forward and backward pass on images (N, C, H, W) and labels (N,), with a fault of faults.FAULTS.

    Raises RuntimeError if a dense block did not take side.path.
    """
    result, model, in_blocks = Record(), build_model(side, net), side.path != "textbook"
    images = images.to(side.device, side.dtype, memory_format=side.memory_format).detach().requires_grad_()
    if not in_blocks and not side.compiled:
        record_layer_outputs(model, net, side, result)
    forward = torch.compile(model) if side.compiled else model
    target = target_of(model) if fault else None
    with (torch.backends.cudnn.flags(enabled=side.cudnn, allow_tf32=False),  # TF32 would exceed the limits
          injected(fault, target, in_blocks)):
        with torch.autocast(side.device, torch.bfloat16, enabled=side.autocast):
            output = forward(images)
            output = F.log_softmax(output, 1) if side.torchvision else output
            loss = F.nll_loss(output, labels.to(side.device))
        if not side.torchvision and not side.compiled:
            check_path(model, side.path)
        if in_blocks:
            record_states_in_blocks(model, output, result)
        loss.backward()
    result.put("state", "output", output)
    result.put("state", "loss", loss)
    result.put("gradient", "images", images.grad)
    record_parameters_and_statistics(model, net, side, result)
    return result


def build_model(side: Side, net: DenseNet) -> nn.Module:
    """-> a network for this side with the weights of ``net``, in training mode, with running statistics of zero"""
    model = torchvision_net(net) if side.torchvision else copy.deepcopy(net)
    for buffer in model.buffers():
        buffer.zero_()  # after the pass they are momentum times the batch statistics
    model = model.train().to(side.device, side.dtype).to(memory_format=side.memory_format)
    if not side.torchvision:
        set_path(model, side.path)
    return model


def record_layer_outputs(model: nn.Module, net: DenseNet, side: Side, result: Record) -> None:
    """Records the output of every layer with forward hooks.

    A dense layer's new channels are its last k. Only these are recorded, since torchvision's layers return no others.
    """
    for name, module in layers_of(net):
        dense = isinstance(module, (Bottleneck, SingleLayer))
        channels = slice(-net.arguments["growthRate"], None) if dense else slice(None)

        def hook(_, inputs: tuple[torch.Tensor], output: torch.Tensor, name=name, channels=channels) -> None:
            if name == "fc":
                result.put_state("features", inputs[0])
            result.put_state(name, output, channels)

        model.get_submodule(torchvision_name(name) if side.torchvision else name).register_forward_hook(hook)


def record_states_in_blocks(model: DenseNet, output: torch.Tensor, result: Record) -> None:
    """Records the states inside efficient blocks: x = xhat / rstd + mean, with xhat and rstd as saved for backward."""
    nodes = [node for node in operations(output) if "EfficientBlock" in node.name()]
    nodes.reverse()  # in order of the forward pass
    transitions, k = parts_of(model, Transition), model.arguments["growthRate"]
    norms = [*(transition.bn1 for transition in transitions.values()), model.bn1]
    blocks = parts_of(model, DenseBlock).items()
    for (name, block), before, norm, node in zip(blocks, ["conv1", *transitions], norms, nodes, strict=True):
        xhat, rstd, *_ = node.saved_tensors[node.nParameters:]
        mean = norm.running_mean / norm.momentum  # see build_model
        x = xhat / rstd[:, None, None] + mean[:, None, None]
        input_channels = norm.num_features - k * len(block)
        result.put("state", before, x[:, :input_channels])
        for i, new in enumerate(x[:, input_channels:].split(k, 1)):
            result.put("state", f"{name}.{i}", new)
        node.register_hook(lambda grads, _, before=before: result.put("gradient", before, grads[0]))


def record_parameters_and_statistics(model: nn.Module, net: DenseNet, side: Side, result: Record) -> None:
    ours = {torchvision_name(name) if side.torchvision else name: name for name in net.state_dict()}
    for name, p in model.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad  # a missing gradient counts as a difference
        result.put("parameter", ours[name], gradient)
    for name, buffer in model.named_buffers():
        result.put("statistic", ours[name], buffer)
