"""Fine-tuning on your own photographs, from published ImageNet weights: `--config=configs/finetune.py:NET`.

`--config.init_from=WEIGHTS` names a file or a workdir of that net, `--config.dataset=folder:PATH` the photographs, as
`class/image`; a folder of `train/class/image` and `val/class/image` needs `--config.train_split=train
--config.eval_split=val`, and a TFDS data set its own splits. A classifier with another number of classes is
initialised anew; all layers are trained.
"""

from configs import default, imagenet, recipes
from jaxnets import list_models
from jaxnets.models import default_image_size

NETS = [name for name in list_models() if default_image_size(name) == 224]


def get_config(words: str = ""):
    """The named net (default: mobilenet_v2) on the folder `photos`, a tenth of which is for evaluation."""
    config = default.get_config()
    config.model.name, _ = recipes.choose(words, NETS, "mobilenet_v2", ["default"])
    imagenet.photographs(config)
    if config.model.name == "googlenet":
        config.mean, config.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # what its published weights expect
    config.dataset = "folder:photos"
    config.train_split, config.eval_split = "train[:90%]", "train[90%:]"
    config.init_from = "weights.safetensors"
    config.batch_size, config.num_epochs = 32, 10
    config.optimizer.update(name="adamw", learning_rate=3e-4, weight_decay=0.05)
    config.crop_area = 0.35
    config.label_smoothing = 0.1
    return config
