"""MobileNetV2 on CIFAR-10."""

from configs import default, recipes

WIDTHS = {"x0_35": 0.35, "x0_5": 0.5, "x0_75": 0.75, "x1_0": 1.0, "x1_3": 1.3, "x1_4": 1.4}
QUICK_EPOCHS = {"x0_35": 13, "x0_5": 8, "x0_75": 4, "x1_0": 4, "x1_3": 1, "x1_4": 1}


def get_config(words: str = ""):
    """The CIFAR net with projection shortcuts, of the named width (default: x1_0), trained by a recipe of `recipes`."""
    config = default.get_config()
    variant, recipe = recipes.choose(words, WIDTHS, "x1_0")
    config.model.name = "mobilenet_v2_cifar"
    if WIDTHS[variant] != 1:  # 1 stays unset (the net's default), so that another net can be named
        config.model.width = WIDTHS[variant]
    if recipe is recipes.quick:
        config.num_epochs = QUICK_EPOCHS[variant]
        recipes.muon(config)
    recipe(config)
    return config
