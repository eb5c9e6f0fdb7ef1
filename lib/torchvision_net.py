"""torchvision's DenseNet as an independent implementation of our networks."""

import torch.nn as nn
import torchvision

from densenet import DenseBlock, DenseNet, Transition
from lib.layers import parts_of


def torchvision_net(net: DenseNet) -> nn.Module:
    """-> torchvision's DenseNet with the weights of ``net``, and a 3x3 convolution instead of ImageNet's stem"""
    a = net.arguments
    channels = net.conv1.out_channels
    blocks = tuple(len(block) for block in parts_of(net, DenseBlock).values())
    theirs = torchvision.models.DenseNet(a["growthRate"], blocks, channels, a["bnSize"], num_classes=a["nClasses"])
    theirs.features.conv0 = nn.Conv2d(a["inChannels"], channels, kernel_size=3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict(net.torchvision_state_dict())
    return theirs


def check_torchvision_has(net: DenseNet, against: str) -> None:
    """Raises ValueError if torchvision's DenseNet cannot be this network; ``against`` is compare_grads.py's flag."""
    convs = [transition.conv1 for transition in parts_of(net, Transition).values()]
    halves_channels = all(conv.out_channels == conv.in_channels // 2 for conv in convs)
    if not net.arguments["bottleneck"] or not halves_channels:
        raise ValueError(f"--against {against}: torchvision's DenseNet always has bottlenecks and reduction 0.5; valid "
                         "for this network are plain, cuda, cudnn-off, channels_last, compile")
