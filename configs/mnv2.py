"""MobileNetV2 on CIFAR-10."""

from configs import default

WIDTHS = {"x0_5": 0.5, "x0_75": 0.75, "x1_0": 1.0, "x1_4": 1.4}


def get_config(variant: str = "x1_0"):
    """The CIFAR net with projection shortcuts, of a width; SGD and a cosine schedule."""
    config = default.get_config()
    config.model.name = "mobilenet_v2_cifar"
    config.model.width = default.choose(variant, WIDTHS)
    return config
