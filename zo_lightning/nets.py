"""Classifiers for images: the study's two and a perceptron, 28x28 by default, and two deeper ones, 32x32."""

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad, relu

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


class SmallVGG(nn.Module):
    """Six 3x3 convolutions in three stages and a linear layer, 307,946 weights for 32x32 colour images and 10 classes.

    Each stage is twice [Conv 3x3, BatchNorm, ReLU], then MaxPool2; stages have ``width``, 2 ``width`` and 4 ``width``
    channels; Linear(16 * 4 width -> 10). Takes float images ``(N, in_channels, image_size, image_size)`` and returns
    logits ``(N, num_classes)``. Weights are normal with variance 2 / fan-in (He et al., *Delving deep into rectifiers*,
    2015), those of the linear layer 1 / fan-in, drawn from torch's global generator; biases are 0. Raises
    ``ValueError`` for sizes that give no network.
    Source: Simonyan and Zisserman, *Very deep convolutional networks for large-scale image recognition*, 2015, made
    small.

    Args:
        width: Channels of the first stage.
        batch_norm: Normalise after each convolution, which then has no bias.
        num_classes: Number of logits.
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
    """

    def __init__(
        self,
        width: int = 32,
        batch_norm: bool = True,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        _check_at_least(1, width=width, num_classes=num_classes, in_channels=in_channels)
        _check_at_least(8, image_size=image_size)  # for three poolings
        sizes = [in_channels, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        pairs = list(pairwise(sizes))
        self.convs = nn.ModuleList(nn.Conv2d(n, m, 3, padding=1, bias=not batch_norm) for n, m in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(m) if batch_norm else nn.Identity() for _, m in pairs)
        self.fc = nn.Linear(4 * width * (image_size // 8) ** 2, num_classes)
        _initialise_rectified(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of ``images``."""
        maps = images
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            maps = relu(norm(conv(maps)))
            if k % 2:
                maps = max_pool2d(maps, 2)
        return self.fc(maps.flatten(1))


class ResNet20(nn.Module):
    """The residual net for CIFAR of 20 layers, 269,722 parameters for colour images and 10 classes.

    Conv 3x3, three stages of three blocks with ``width``, 2 ``width`` and 4 ``width`` channels, the mean over all
    pixels, Linear. Takes float images ``(N, in_channels, H, W)`` of any size and returns logits ``(N, num_classes)``.
    Weights are initialised as in `SmallVGG`. Raises ``ValueError`` for sizes that give no network.
    Source: He, Zhang, Ren and Sun, *Deep residual learning for image recognition*, 2016 (section 4.2, shortcuts A).

    Args:
        width: Channels of the first stage.
        num_classes: Number of logits.
        in_channels: Channels of an image.
    """

    def __init__(self, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        _check_at_least(1, width=width, num_classes=num_classes, in_channels=in_channels)
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.blocks = nn.ModuleList(ResidualBlock(n, m) for n, m in pairwise(sizes))
        self.fc = nn.Linear(4 * width, num_classes)
        _initialise_rectified(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of ``images``."""
        maps = relu(self.norm(self.conv(images)))
        for block in self.blocks:
            maps = block(maps)
        return self.fc(maps.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut without weights around them.

    Takes and returns maps, ``(N, in_channels, H, W)`` and ``(N, out_channels, H / s, W / s)``; where there are more
    channels than before, s is 2, and the shortcut takes every second pixel and fills up with zeros, else s is 1.

    Args:
        in_channels: Channels of the maps that it takes.
        out_channels: Channels of those that it returns, at least as many.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride, self.more = (1, 0) if in_channels == out_channels else (2, out_channels - in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps that follow ``maps``."""
        inner = self.norm2(self.conv2(relu(self.norm1(self.conv1(maps)))))
        around = pad(maps[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.more]) if self.more else maps
        return relu(inner + around)


def _features(images: Tensor, conv1: nn.Conv2d, conv2: nn.Conv2d) -> Tensor:
    maps = max_pool2d(relu(conv1(images)), 2)
    return max_pool2d(relu(conv2(maps)), 2).flatten(1)


def _feature_side(num_classes: int, in_channels: int, image_size: int) -> int:
    """Check the sizes and return the side of the feature maps after both convolutions and poolings."""
    _check_at_least(1, num_classes=num_classes, in_channels=in_channels)
    if image_size < 12:
        raise ValueError(f"image_size={image_size} must be at least 12: two poolings leave nothing of less")
    return ((image_size - 4) // 2 - 2) // 2


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def _initialise(net: nn.Module) -> None:
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter)
        else:
            nn.init.constant_(parameter, 0.01)


def _initialise_rectified(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
