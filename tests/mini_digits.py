"""The configuration of a few epochs of a small net on few, small digits: seconds to compile and to train."""

from configs import digits


def get_config():
    """Ten steps an epoch, each reported; BatchNorm to get wrong, and an average to keep."""
    config = digits.get_config()
    config.train_split, config.eval_split = "train[:160]", "test[:50]"
    config.model.name = "vgg16_bn_cifar"
    config.model.width = 1 / 64  # 8 channels everywhere, the least
    config.model.stem_stride = None
    config.num_epochs, config.batch_size = 3, 16
    config.steps_per_call = config.log_every_steps = 1
    config.ema_decay = 0.9
    return config
