"""ResNet on CIFAR-10, for comparison."""

from configs import default, recipes

NETS = {depth: f"resnet{depth}_cifar" for depth in ("18", "34", "50", "101", "152")}
QUICK_EPOCHS = 4
QUICK_PERCENT = {"18": 35, "34": 17, "50": 13, "101": 6, "152": 4}  # of the images: an epoch over all takes too long


def get_config(words: str = ""):
    """The CIFAR net of the named depth (default: 18), trained by a recipe of `recipes`."""
    config = default.get_config()
    variant, recipe = recipes.choose(words, NETS, "18")
    config.model.name = NETS[variant]
    if recipe is recipes.quick:
        config.num_epochs, config.train_split = QUICK_EPOCHS, f"train[:{QUICK_PERCENT[variant]}%]"
    recipe(config)
    return config
