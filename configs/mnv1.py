"""MobileNetV1 on CIFAR-10."""

from configs import default

WIDTHS = {"x0_25": 0.25, "x0_5": 0.5, "x0_75": 0.75, "x1_0": 1.0}


def get_config(variant: str = "x1_0"):
    """The CIFAR net of a width, SGD and a cosine schedule."""
    config = default.get_config()
    config.model.name = "mobilenet_v1_cifar"
    config.model.width = default.choose(variant, WIDTHS)
    return config
