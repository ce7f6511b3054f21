"""The study's networks: small classifiers for square images, 28x28 by default."""

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

MAX_PARAMETERS = 1_000_000_000


class SmallCNN(nn.Module):
    """Two convolutions and one linear layer, 2,590 parameters for 28x28 grey-scale images and 10 classes.

    Conv(1->3, 5x5) ReLU MaxPool2, Conv(3->9, 3x3) ReLU MaxPool2, Linear(225->10). Takes float images
    ``(N, in_channels, image_size, image_size)`` and returns logits ``(N, num_classes)``. Weights are Xavier-normal,
    drawn from torch's global generator, biases are 0.01. Raises ``ValueError`` for sizes that give no network.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        side = _feature_side(num_classes, in_channels, image_size)
        self.conv1 = nn.Conv2d(in_channels, 3, 5)
        self.conv2 = nn.Conv2d(3, 9, 3)
        self.fc1 = nn.Linear(9 * side**2, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of ``images``."""
        return self.fc1(_features(images, self.conv1, self.conv2))


class ScalableCNN(nn.Module):
    """Two convolutions and three linear layers whose widths grow with ``scale``, so that only the size d changes.

    Conv(1->3, 5x5) ReLU MaxPool2, Conv(3->3, 3x3) ReLU MaxPool2, Linear(75->h1) ReLU, Linear(h1->h2) ReLU,
    Linear(h2->10), with (h1, h2) from `widths`: d = 1,400 at scale 1/9 and 2,806,751 at 120 - 1/9. Takes float images
    ``(N, in_channels, image_size, image_size)`` and returns logits ``(N, num_classes)``. Weights are Xavier-normal,
    drawn from torch's global generator, biases are 0.01. Raises ``ValueError`` for sizes that give no network, or
    one of more than 1e9 parameters.

    Args:
        scale: Width of the linear layers, in units of 120 hidden neurons.
        num_classes: Number of logits.
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
    """

    def __init__(self, scale: float = 1 / 9, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        features = 3 * _feature_side(num_classes, in_channels, image_size) ** 2
        h1, h2 = self.widths(scale)
        linear_parameters = (features + 1) * h1 + (h1 + 1) * h2 + (h2 + 1) * num_classes
        if linear_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"scale={scale} gives {linear_parameters:,} parameters, more than {MAX_PARAMETERS:,}; "
                "the study uses scales between 1/9 and 120"
            )
        self.conv1 = nn.Conv2d(in_channels, 3, 5)
        self.conv2 = nn.Conv2d(3, 3, 3)
        self.fc1 = nn.Linear(features, h1)
        self.fc2 = nn.Linear(h1, h2)
        self.fc3 = nn.Linear(h2, num_classes)
        _initialise(self)

    @staticmethod
    def widths(scale: float) -> tuple[int, int]:
        """Return (h1, h2) = (max(10, floor(120 scale)), max(10, floor(sqrt(120 scale))))."""
        if not (scale > 0 and math.isfinite(120 * scale)):
            raise ValueError(f"scale={scale} must be a finite number above 0, such as 1/9")
        return max(10, math.floor(120 * scale)), max(10, math.floor(math.sqrt(120 * scale)))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of ``images``."""
        hidden = relu(self.fc1(_features(images, self.conv1, self.conv2)))
        return self.fc3(relu(self.fc2(hidden)))


class MLP(nn.Module):
    """A perceptron on the pixels: linear layers with ReLU between them, 101,770 parameters for 28x28-10 and 128 hidden.

    Takes float images ``(N, in_channels, image_size, image_size)`` and returns logits ``(N, num_classes)``. Weights are
    Xavier-normal, drawn from torch's global generator, biases are 0.01. Raises ``ValueError`` where a size is below 1.

    Args:
        hidden: Widths of the hidden layers; none makes it linear.
        num_classes: Number of logits.
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
    """

    def __init__(
        self, hidden: tuple[int, ...] = (128,), num_classes: int = 10, in_channels: int = 1, image_size: int = 28
    ) -> None:
        super().__init__()
        sizes = (in_channels * image_size**2, *hidden, num_classes)
        if min(*sizes, in_channels, image_size) < 1:
            raise ValueError(f"sizes must be at least 1, got {in_channels}x{image_size}x{image_size}, {sizes[1:]}")
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of ``images``."""
        return self.layers(images)


def _features(images: Tensor, conv1: nn.Conv2d, conv2: nn.Conv2d) -> Tensor:
    maps = max_pool2d(relu(conv1(images)), 2)
    return max_pool2d(relu(conv2(maps)), 2).flatten(1)


def _feature_side(num_classes: int, in_channels: int, image_size: int) -> int:
    """Check the sizes and return the side of the feature maps after both convolutions and poolings."""
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if image_size < 12:
        raise ValueError(f"image_size={image_size} must be at least 12: two poolings leave nothing of less")
    return ((image_size - 4) // 2 - 2) // 2


def _initialise(net: nn.Module) -> None:
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter)
        else:
            nn.init.constant_(parameter, 0.01)
