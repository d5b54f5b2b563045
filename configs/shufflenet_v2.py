"""ShuffleNetV2 on CIFAR-10."""

from configs import default

NETS = {width: f"shufflenet_v2_{width}_cifar" for width in ("x0_5", "x1_0", "x1_5", "x2_0")}


def get_config(variant: str = "x1_0"):
    """The CIFAR net of a width, SGD and a cosine schedule."""
    config = default.get_config()
    config.model.name = default.choose(variant, NETS)
    return config
