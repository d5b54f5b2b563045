"""VGG on CIFAR-10, for comparison."""

from configs import default, recipes

NETS = {variant: f"vgg{variant}_cifar" for variant in ("16", "16_bn", "19", "19_bn")}
QUICK_EPOCHS = 1
QUICK_SPLIT = {"16": "train", "16_bn": "train", "19": "train[:85%]", "19_bn": "train[:85%]"}


def get_config(words: str = ""):
    """The CIFAR net of the named depth, with BatchNorm (_bn) or without (default: 16_bn); a recipe of `recipes`.

    Without BatchNorm, rates are lower (`recipes.gentler`), also in the reference recipe.
    """
    config = default.get_config()
    variant, recipe = recipes.choose(words, NETS, "16_bn")
    config.model.name = NETS[variant]
    if recipe is recipes.quick:
        config.num_epochs, config.train_split = QUICK_EPOCHS, QUICK_SPLIT[variant]
    recipe(config)
    config.progressive_sizes = ()  # its five pooling layers leave nothing of a smaller image
    if not variant.endswith("_bn"):
        recipes.gentler(config)
    return config
