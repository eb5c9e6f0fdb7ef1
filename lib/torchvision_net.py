"""torchvision's DenseNet as an independent implementation of a network of ours."""

import torch.nn as nn
import torchvision

from densenet import DenseBlock, DenseNet, Transition
from lib.layers import parts_of


def torchvision_net(net: DenseNet) -> nn.Module:
    """-> torchvision's DenseNet with the weights of ``net``, and its first convolution in place of ImageNet's stem"""
    a, width = net.arguments, net.conv1.out_channels
    blocks = tuple(len(block) for block in parts_of(net, DenseBlock).values())
    theirs = torchvision.models.DenseNet(a["growthRate"], blocks, width, a["bnSize"], num_classes=a["nClasses"])
    theirs.features.conv0 = nn.Conv2d(a["inChannels"], width, kernel_size=3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict(net.torchvision_state_dict())
    return theirs


def check_torchvision_has(net: DenseNet, against: str) -> None:
    """Raises ValueError if torchvision's DenseNet cannot be such a network; ``against`` is compare_grads.py's flag."""
    halves = all(t.conv1.out_channels == t.conv1.in_channels // 2 for t in parts_of(net, Transition).values())
    if not net.arguments["bottleneck"] or not halves:
        raise ValueError(f"--against {against}: torchvision's DenseNet has bottlenecks and reduction 0.5 only; valid "
                         "for this network are plain, cuda, cudnn-off, channels_last, compile")
