"""ShuffleNetV1 on CIFAR-10."""

from configs import default

NETS = {groups: f"shufflenet_v1_{groups}_cifar" for groups in ("g1", "g2", "g3", "g4", "g8")}


def get_config(variant: str = "g3"):
    """The CIFAR net with a number of groups, SGD and a cosine schedule."""
    config = default.get_config()
    config.model.name = default.choose(variant, NETS)
    return config
