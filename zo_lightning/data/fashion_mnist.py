"""Fashion-MNIST."""

from zo_lightning.data.mnist import MNIST


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, in the format of MNIST.

    Source: Xiao, Rasul and Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking*, arXiv:1708.07747, 2017.

    Args:
        batch_size: Images per batch (over all processes); the last batch of an epoch may be smaller.
        val_size: Images taken from the training set for validation, or the share of them where it is below 1; 0 trains
            on all and validates on the test set.
        seed: Decides the validation split and, together with the epoch, the order of the training images; None takes
            the one given to ``torch.manual_seed`` or ``seed_everything``.
        root: Folder that holds ``FashionMNIST/raw``, laid out as torchvision does.
        download: Download the data where they are absent.
    """

    title = "FashionMNIST"
