"""ImageNet, or any folder of images: `--config=configs/imagenet.py:NET`, trained by the recipe of the net's paper.

MobileNetV1   RMSProp .9, epsilon 1, rate .045 times .94 every 2 epochs, decay 4e-5 but none on depthwise kernels
              (arXiv 1704.04861, section 3.2: as Inception V3, which is 1512.00567, section 8);
              gradient norm at most 2, also as there; batches of 96 and the decay as for MobileNetV2, 100 epochs as
              for Inception V3
MobileNetV2   RMSProp .9, momentum .9, rate .045 times .98 every epoch, decay 4e-5, batches of 96
              (1801.04381, section 6.1); epsilon 1 as for Inception V3; the 300 epochs are ours. Epsilon is added to
              the root, as in PyTorch; TensorFlow's RMSProp adds it under the root
ShuffleNets   SGD .9, rate .5 falling linearly to 0, decay 4e-5, batches of 1024, 240 epochs (1707.01083, section 4:
              300,000 steps; 1807.11164 keeps it); label smoothing .1 as in the authors' code
SqueezeNet    SGD .9, rate .04 falling linearly to 0 (1602.07360, section 3.3), decay 2e-4, batches of 512, 68 epochs
              (the authors' solver: 170,000 steps)
ResNet        SGD .9, rate .1 times .1 twice, decay 1e-4, batches of 256 (1512.03385, section 3.4); the drops at 1/3
              and 2/3 of 90 epochs are ours
VGG           SGD .9, rate .01 times .1 three times, decay 5e-4, batches of 256, 74 epochs (1409.1556, section 3.1);
              the drops at 1/3, 2/3 and 5/6 of them are ours

The MobileNet papers trained asynchronously on 16 or more devices; here a batch spans all devices, and the rate falls
smoothly. Nobody has trained ImageNet itself with this file yet. Training images are random-resized crops, of at least
.08 of the image unless set otherwise below (as in 1409.4842, section 6), and mirrored; evaluation takes the centre of
the image resized to 8/7 of `image_size`. Colour jitter, which some of the authors used, is left out.

A folder of `train/class/image` and `val/class/image`: `--config.dataset=folder:PATH`; one of `class/image` also needs
`--config.train_split='train[:90%]' --config.eval_split='train[90%:]'`.
"""

from configs import default, recipes
from jaxnets import list_models
from jaxnets.models import default_image_size


def mobilenet_v1(config):
    config.batch_size, config.num_epochs = 96, 100
    config.optimizer.update(name="rmsprop", learning_rate=0.045, beta2=0.9, momentum=0.0, epsilon=1.0)
    config.optimizer.update(weight_decay=4e-5, decay_depthwise=False, clip_norm=2.0)
    config.schedule.update(name="exponential", decay=0.94**0.5, warmup_epochs=0.0)
    config.crop_area = 0.25  # "limiting the size of small crops": the paper gives no number


def mobilenet_v2(config):
    config.batch_size, config.num_epochs = 96, 300
    config.optimizer.update(name="rmsprop", learning_rate=0.045, beta2=0.9, momentum=0.9, epsilon=1.0)
    config.optimizer.weight_decay = 4e-5
    config.schedule.update(name="exponential", decay=0.98, warmup_epochs=0.0)


def shufflenet(config):
    config.batch_size, config.num_epochs = 1024, 240
    config.optimizer.update(name="sgd", learning_rate=0.5, momentum=0.9, nesterov=False, weight_decay=4e-5)
    config.schedule.update(name="linear", warmup_epochs=0.0)
    config.label_smoothing = 0.1
    config.crop_area = 0.25  # "slightly less aggressive scale augmentation": the paper does not say how much less


def squeezenet(config):
    config.batch_size, config.num_epochs = 512, 68
    config.optimizer.update(name="sgd", learning_rate=0.04, momentum=0.9, nesterov=False, weight_decay=2e-4)
    config.schedule.update(name="linear", warmup_epochs=0.0)


def resnet(config):
    config.batch_size, config.num_epochs = 256, 90
    config.optimizer.update(name="sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
    config.schedule.update(name="step", boundaries=(1 / 3, 2 / 3), decay=0.1, warmup_epochs=0.0)


def vgg(config):
    config.batch_size, config.num_epochs = 256, 74
    config.optimizer.update(name="sgd", learning_rate=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4)
    config.schedule.update(name="step", boundaries=(1 / 3, 2 / 3, 5 / 6), decay=0.1, warmup_epochs=0.0)


# By the prefix of a net's name; GoogLeNet's paper gives no learning rate.
PAPERS = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet": shufflenet,
    "squeezenet": squeezenet,
    "resnet": resnet,
    "vgg": vgg,
}
NETS = {name: family for family in PAPERS for name in list_models(f"{family}*") if default_image_size(name) == 224}


def get_config(words: str = ""):
    """The named net (default: mobilenet_v2) on `imagenet2012` as TFDS prepares it."""
    config = default.get_config()
    net, _ = recipes.choose(words, NETS, "mobilenet_v2", ["default"])
    config.model.name = net
    config.dataset = "imagenet2012"
    config.eval_split = "validation"
    photographs(config)
    config.steps_per_call = 1  # all images of a call are in memory at once, and a step alone takes long enough
    PAPERS[NETS[net]](config)
    return config


def photographs(config) -> None:
    """Random-resized crops of 224 pixels, normalised as torchvision's nets expect them."""
    config.image_size = 224
    config.crop = True
    config.crop_area = 0.08  # 1409.4842, section 6
    config.augment.crop_padding = 0
    config.mean, config.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
