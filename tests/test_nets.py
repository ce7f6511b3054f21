"""The networks: sizes, initialisation, the function they compute, refused arguments."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d, relu

from zo_lightning.nets import MLP, ResidualBlock, ResNet20, ScalableCNN, SmallCNN, SmallVGG


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("scale", "widths", "d"),
    [(1 / 9, (13, 10), 1_400), (10, (1200, 34), 132_546), (120 - 1 / 9, (14386, 119), 2_806_751)],
)
def test_scalable_cnn_has_the_published_sizes(scale: float, widths: tuple[int, int], d: int) -> None:
    assert ScalableCNN.widths(scale) == widths
    assert size(ScalableCNN(scale)) == d


@pytest.mark.parametrize("net_class", [SmallCNN, ScalableCNN, SmallVGG, ResNet20, MLP])
def test_seed_decides_the_weights(net_class: type[nn.Module]) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(net_class().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_weights_are_xavier_normal_and_biases_constant() -> None:
    torch.manual_seed(0)
    net = ScalableCNN(120)
    assert all((p == 0.01).all() for p in net.parameters() if p.ndim == 1)
    assert net.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / sum(net.fc1.weight.shape)), rel=0.01)
    kurtosis = (net.fc1.weight / net.fc1.weight.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.05)  # 1.8 if it were uniform


def test_forward_is_the_published_composition() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 1, 28, 28)
    small, scalable = SmallCNN(), ScalableCNN(1)

    def features(net: SmallCNN | ScalableCNN) -> torch.Tensor:
        maps = max_pool2d(relu(net.conv1(images)), 2)
        return max_pool2d(relu(net.conv2(maps)), 2).flatten(1)

    assert torch.equal(small(images), small.fc1(features(small)))
    hidden = relu(scalable.fc2(relu(scalable.fc1(features(scalable)))))
    assert torch.equal(scalable(images), scalable.fc3(hidden))


@pytest.mark.parametrize("net_class", [SmallCNN, ScalableCNN, MLP])
def test_other_images_and_classes(net_class: type[nn.Module]) -> None:
    net = net_class(num_classes=7, in_channels=3, image_size=32)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e308])
def test_scale_must_be_finite_and_positive(scale: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"scale={scale} must be a finite number above 0")):
        ScalableCNN(scale)


def test_absurdly_large_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale=1000000.0 gives .* parameters, more than 1,000,000,000"):
        ScalableCNN(1e6)


@pytest.mark.parametrize(("argument", "value"), [("num_classes", 0), ("in_channels", -1), ("image_size", 8)])
@pytest.mark.parametrize("net_class", [SmallCNN, ScalableCNN])
def test_impossible_sizes_are_named(net_class: type[nn.Module], argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value} must be"):
        net_class(**{argument: value})


@pytest.mark.parametrize(("width", "batch_norm", "d"), [(32, True, 307_946), (32, False, 307_498), (8, True, 23_426)])
def test_small_vgg_has_its_size(width: int, batch_norm: bool, d: int) -> None:
    net = SmallVGG(width, batch_norm)
    assert size(net) == d
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_resnet20_has_the_published_size_and_depth() -> None:
    net = ResNet20()
    assert size(net) == 269_722  # "0.27M" in the paper's table 6
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules()) == 20
    maps = net.norm(net.conv(torch.rand(2, 3, 32, 32)))
    shapes = [tuple((maps := block(maps)).shape[1:]) for block in net.blocks]
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_a_block_adds_to_a_shortcut_without_weights() -> None:
    block = ResidualBlock(2, 4)
    nn.init.zeros_(block.norm2.weight)
    maps = torch.randn(3, 2, 6, 6)
    found = block(maps)
    assert torch.equal(found[:, :2], relu(maps[:, :, ::2, ::2]))
    assert not found[:, 2:].any()


@pytest.mark.parametrize("net_class", [SmallVGG, ResNet20])
def test_activations_keep_their_size_through_deep_nets(net_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    logits = net_class()(torch.randn(64, 3, 32, 32))
    assert 0.3 < logits.std().item() < 3


@pytest.mark.parametrize("batch_norm", [True, False])
def test_small_vgg_takes_other_images_and_classes(batch_norm: bool) -> None:
    net = SmallVGG(4, batch_norm, num_classes=7, in_channels=1, image_size=28)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(("argument", "value"), [("width", 0), ("num_classes", 0), ("image_size", 7)])
def test_sizes_that_give_no_vgg_are_named(argument: str, value: int) -> None:
    arguments: dict[str, Any] = {argument: value}
    with pytest.raises(ValueError, match=f"{argument}={value} must be at least"):
        SmallVGG(**arguments)


def test_mlp_is_linear_layers_with_relu_between_them() -> None:
    torch.manual_seed(0)
    net, images = MLP(), torch.rand(4, 1, 28, 28)
    assert size(net) == 784 * 128 + 128 + 128 * 10 + 10
    first, second = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    assert torch.equal(net(images), second(relu(first(images.flatten(1)))))
    assert size(MLP(hidden=(), num_classes=3, in_channels=2, image_size=4)) == 32 * 3 + 3
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got 1x28x28, \(0, 10\)"):
        MLP(hidden=(0,))
