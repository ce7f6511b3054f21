"""The study's networks: sizes, initialisation, the function they compute, refused arguments."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d, relu

from zo_lightning.nets import MLP, ScalableCNN, SmallCNN


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("scale", "widths", "d"),
    [(1 / 9, (13, 10), 1_400), (10, (1200, 34), 132_546), (120 - 1 / 9, (14386, 119), 2_806_751)],
)
def test_scalable_cnn_has_the_published_sizes(scale: float, widths: tuple[int, int], d: int) -> None:
    assert ScalableCNN.widths(scale) == widths
    assert size(ScalableCNN(scale)) == d


@pytest.mark.parametrize("net_class", [SmallCNN, ScalableCNN, MLP])
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


def test_mlp_is_linear_layers_with_relu_between_them() -> None:
    torch.manual_seed(0)
    net, images = MLP(), torch.rand(4, 1, 28, 28)
    assert size(net) == 784 * 128 + 128 + 128 * 10 + 10
    first, second = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    assert torch.equal(net(images), second(relu(first(images.flatten(1)))))
    assert size(MLP(hidden=(), num_classes=3, in_channels=2, image_size=4)) == 32 * 3 + 3
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got 1x28x28, \(0, 10\)"):
        MLP(hidden=(0,))
