"""Every field of a run, listed once with its default: plain SGD. The other configs start from here and override fields.

Each family's own file applies a recipe of `recipes`, by default the one called `default`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxnets.errors import UserError


def get_config(words: str = "") -> ConfigDict:
    """The defaults: a CIFAR-10 run of a CIFAR net; UserError for words, which only the families' files take."""
    if words:
        raise UserError(f"configs/default.py takes no words such as {words!r}; configs/mnv2.py and the others do")
    config = ConfigDict()
    config.seed = 0  # the one seed: initial weights, order of the data, augmentation, dropout
    for add in (_data, _augmentation, _net, _length, _optimizer, _schedule, _loss_and_averaging, _running):
        add(config)
    return config.lock()  # so that a misspelt field in another file is an error


def _data(config: ConfigDict) -> None:
    config.dataset = "cifar10"  # cifar10, cifar100, digits, any prepared by TFDS, or folder:PATH of class/image files
    config.data_dir = placeholder(str)  # None: TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.train_split = "train"  # TFDS split syntax, e.g. train[:45000]
    config.eval_split = "test"  # likewise
    config.image_size = 32  # pixels a side; other images are resized
    config.crop = False  # resize the shorter side to 8/7 image_size and take the centre; else squeeze it all
    config.mean = (0.4914, 0.4822, 0.4465)  # per channel, of images in [0, 1]
    config.std = (0.2470, 0.2435, 0.2616)  # likewise, above 0
    config.resident = "auto"  # auto, true, false: keep the decoded data set on the devices, or stream it
    config.resident_limit = 4 << 30  # bytes of decoded images; "auto" streams larger data sets
    config.num_workers = placeholder(int)  # processes that read streamed data; 0: threads; None: 1 per core, up to 16
    config.crop_area = 0.0  # smallest share of an image in a random-resized crop, (0, 1]; streams the images; 0: off
    config.progressive_sizes = ()  # over equal shares of the run, (16, 32) pixels or (0.5, 1.0) of image_size; (): off


def _augmentation(config: ConfigDict) -> None:
    """Augmentation of the training images, on the device."""
    config.augment = ConfigDict()
    config.augment.crop_padding = 4  # pixels of black border before a random crop; 0: off
    config.augment.flip = True  # mirror each image with probability 1/2
    config.augment.cutout = 0  # side in pixels of a square set to the mean; 0: off
    config.augment.mixup = 0.0  # alpha of Beta(alpha, alpha), the distribution of the blending weight; 0: off
    config.augment.cutmix = 0.0  # likewise, of the share that a box of another image leaves; 0: off; both: either


def _net(config: ConfigDict) -> None:
    """The net: its name, the fields of `jaxnets.create_model` (None: the net's own default), its initial weights."""
    config.model = ConfigDict()
    config.model.name = "mobilenet_v2_cifar"  # one of `jaxnets.list_models()`
    config.model.num_classes = placeholder(int)  # None: the data set's
    config.model.dtype = "auto"  # float32, bfloat16; auto: bfloat16 on TPUs and GPUs (NVIDIA's since Ampere)
    config.model.width = placeholder(float)  # channel multiplier
    config.model.dropout = placeholder(float)  # rate before the classifier, [0, 1)
    config.model.activation = placeholder(str)  # relu, relu6, silu, ...
    config.model.stem_stride = placeholder(int)  # 1 or 2; all but VGG, GoogLeNet and mobilenet_v2_mini
    config.model.stage_strides = placeholder(tuple)  # MobileNets: one per row of the paper's table
    config.model.padding = placeholder(str)  # MobileNets: torch; keras or same: as in Keras's nets
    config.model.shortcut = placeholder(str)  # MobileNetV2: identity, projection, expansions, none
    config.model.bottleneck = placeholder(str)  # MobileNetV2: linear, nonlinear
    config.model.shuffle = placeholder(bool)  # ShuffleNetV1: False leaves the channel shuffle out
    config.model.variant = placeholder(str)  # ShuffleNets: whose code it follows: paper, torchvision, megvii, kuangliu
    config.model.stage_features = placeholder(tuple)  # ShuffleNetV2: channels of its 3 stages and its last convolution
    config.model.se_ratio = placeholder(float)  # SqueezeNet, ShuffleNetV2: squeeze-and-excitation; 0: none
    config.model.bypass = placeholder(str)  # SqueezeNet: none, simple, complex
    config.model.batch_norm = placeholder(bool)  # SqueezeNet, VGG: after every convolution
    config.model.hidden_features = placeholder(tuple)  # VGG: widths of the dense layers before the classifier
    config.model.pool_size = placeholder(int)  # VGG: side of the feature map that these layers see
    config.model.large_kernel = placeholder(int)  # GoogLeNet: kernel size of the branches called 5x5
    config.model.stochastic_depth = placeholder(float)  # nets with residual blocks: rate of the last block, [0, 1)
    config.model.bn_momentum = placeholder(float)  # weight of the old running statistics, [0, 1); 1 - PyTorch's
    config.model.bn_epsilon = placeholder(float)  # added to the variance
    config.init_from = placeholder(str)  # start from these weights: a .pth, .safetensors or .h5 file, or a workdir
    config.sync_batch_norm = False  # statistics over the whole batch rather than over each device's share


def _length(config: ConfigDict) -> None:
    config.batch_size = 128  # images per step, over all devices
    config.num_epochs = 60  # passes over the training split, each without the incomplete last batch


def _optimizer(config: ConfigDict) -> None:
    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # sgd, adamw, rmsprop, lion, muon
    config.optimizer.learning_rate = 0.1  # the schedule's peak
    config.optimizer.batch_scaling = "none"  # none; linear, sqrt: learning_rate is for batches of 256, scaled to ours
    config.optimizer.momentum = 0.9  # sgd, rmsprop, muon
    config.optimizer.nesterov = True  # sgd, muon
    config.optimizer.beta1 = 0.9  # adamw, lion; muon: for what it leaves to Adam
    config.optimizer.beta2 = 0.999  # adamw, lion, muon's Adam; rmsprop: decay of the squared gradients
    config.optimizer.epsilon = 1e-8  # adamw, rmsprop, muon
    config.optimizer.weight_decay = 5e-4  # sgd, rmsprop: added to the gradient; others: decoupled
    config.optimizer.decay_depthwise = True  # False: exempt depthwise kernels (MobileNetV1, section 3.2)
    config.optimizer.decay_vectors = False  # True: decay biases and BatchNorm's parameters too, as PyTorch does
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: off


def _schedule(config: ConfigDict) -> None:
    """The schedule of the learning rate."""
    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # cosine, linear, step, exponential, constant, one_cycle
    config.schedule.warmup_epochs = 1.0  # linear (one_cycle: cosine, from peak / 25); at most half of the run
    config.schedule.end_factor = 0.0  # cosine, linear: the rate after the last step, as a fraction of the peak
    config.schedule.boundaries = (0.5, 0.75)  # step: where the rate drops, as fractions of num_epochs
    config.schedule.decay = 0.1  # step: factor at each boundary; exponential: factor per epoch


def _loss_and_averaging(config: ConfigDict) -> None:
    config.label_smoothing = 0.0  # weight of the uniform distribution in the targets, [0, 1)
    config.ema_decay = 0.0  # per step, of the averaged weights (EMA), which are evaluated as well; 0: off


def _running(config: ConfigDict) -> None:
    """Execution and reports. None of these changes a result, except that `deterministic` may change the last bits."""
    config.steps_per_call = 10  # at most this many training steps in one dispatch
    config.eval_batch_size = 256  # over all devices, at most: the size taken is the one that pads the last batch least
    config.eval_every_epochs = 1  # and after the last
    config.checkpoint_every_epochs = 1  # and after the last, and on Ctrl-C, SIGTERM and SIGHUP
    config.checkpoint_every_steps = 0  # also after so many steps, within epochs at the end of a call of them; 0: off
    config.keep_checkpoints = 3  # the latest; the best by eval_accuracy and by ema_eval_accuracy are kept as well
    config.log_every_steps = 100  # counted within each epoch, and at its end
    config.deterministic = False  # on a GPU: repeated runs agree bit for bit, with slower operations (XLA's flag)
    config.compilation_cache = True  # keep compiled programs between starts (JAX_COMPILATION_CACHE_DIR)
