"""Recipes for densenet.py in your own code. Each test is one, and compares what it gives with torchvision's network."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from densenet import DenseNet

# Small, so that the tests are fast. With densenet121() and torchvision.models.densenet121(weights="DEFAULT") they are
# the same.
SMALL = dict(growthRate=8, blockConfig=(2, 3, 1, 2), smallInputs=False)


@pytest.fixture
def theirs() -> nn.Module:
    torch.manual_seed(0)
    theirs = torchvision.models.DenseNet(8, (2, 3, 1, 2), 16, num_classes=7).eval()
    nn.init.uniform_(theirs.classifier.weight)  # so that every feature speaks for every class
    return theirs


@pytest.fixture
def net(theirs) -> DenseNet:
    net = DenseNet(**SMALL, nClasses=7)
    net.load_weights(theirs.state_dict())
    return net.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_trunks_feature_maps(net, theirs, images):
    kept = []
    with net.bn1.register_forward_hook(lambda module, inputs, output: kept.append(output)):
        net.features(images)
    maps = F.relu(kept[0])  # (N, C, H / 32, W / 32)

    assert maps.shape[2:] == (2, 2) and close(maps, F.relu(theirs.features(images)))


def test_grad_cam(net, theirs, images):
    kept, label = [], 3
    with net.bn1.register_forward_hook(lambda module, inputs, output: kept.append(output)):
        logits = net.fc(net.features(images))
    slopes = torch.autograd.grad(logits[:, label].sum(), kept[0])[0].mean((2, 3), keepdim=True)
    cam = F.relu((slopes * kept[0]).sum(1))  # (N, H / 32, W / 32)

    maps = theirs.features(images).detach().requires_grad_()
    theirs.classifier(F.relu(maps).mean((2, 3)))[:, label].sum().backward()
    assert cam.max() > 0 and close(cam, F.relu((maps.grad.mean((2, 3), keepdim=True) * maps).sum(1)))


def test_other_classes_from_trained_weights(theirs, images):
    net = DenseNet(**SMALL, nClasses=5)
    net.load_weights(theirs.state_dict(), classifier=False)  # all but the classifier, which stays new
    net.requires_grad_(False)  # leave out these two lines to train the whole network
    net.fc.requires_grad_()
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=0.1)
    loss = F.nll_loss(net(images), torch.tensor([0, 4]))
    loss.backward()
    optimizer.step()

    assert F.nll_loss(net(images), torch.tensor([0, 4])) < loss
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["fc.weight", "fc.bias"]


def test_several_labels_at_once(net, theirs, images):
    labels = torch.tensor([[1.0, 0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1, 0]])  # (N, nClasses)
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.full((7,), 3.0))
    loss = criterion(net.fc(net.features(images)), labels)

    assert close(loss, criterion(theirs(images), labels))


def test_grayscale_from_weights_for_colour(theirs):
    weights = theirs.state_dict()
    weights["features.conv0.weight"] = weights["features.conv0.weight"].sum(1, keepdim=True)
    net = DenseNet(**SMALL, nClasses=7, inChannels=1).eval()
    net.load_weights(weights)

    gray = torch.randn(2, 1, 64, 64)
    assert close(net(gray), theirs(gray.expand(-1, 3, -1, -1)).log_softmax(1))


def test_export_with_any_batch_size(net, images, tmp_path):
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net.eval(), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")  # torch.onnx.export(program, f="net.onnx") writes ONNX

    more = torch.randn(5, 3, 64, 64)
    assert close(torch.export.load(tmp_path / "net.pt2").module()(more), net(more))
