"""SqueezeNet on CIFAR-10."""

from configs import default

NETS = {"1_0": "squeezenet1_0_cifar", "1_1": "squeezenet1_1_cifar"}


def get_config(variant: str = "1_1"):
    """The CIFAR net of a version, SGD and a cosine schedule."""
    config = default.get_config()
    config.model.name = default.choose(variant, NETS)
    # Without BatchNorm the usual rate makes it diverge.
    config.optimizer.learning_rate = 0.01
    config.optimizer.clip_norm = 1.0
    return config
