"""MobileNetV2 on CIFAR-10."""

from configs import default


def get_config():
    """The CIFAR net with projection shortcuts, SGD and a cosine schedule."""
    config = default.get_config()
    config.model.name = "mobilenet_v2_cifar"
    return config
