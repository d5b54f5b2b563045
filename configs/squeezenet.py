"""SqueezeNet on CIFAR-10."""

from configs import default, recipes

NETS = {"1_0": "squeezenet1_0_cifar", "1_1": "squeezenet1_1_cifar"}
QUICK_EPOCHS = {"1_0": 8, "1_1": 17}


def get_config(words: str = ""):
    """The CIFAR net of the named version (default: 1_1), trained by a recipe of `recipes`.

    It has no BatchNorm, so rates are lower (`recipes.gentler`), also in the reference recipe.
    """
    config = default.get_config()
    variant, recipe = recipes.choose(words, NETS, "1_1")
    config.model.name = NETS[variant]
    if recipe is recipes.quick:
        config.num_epochs = QUICK_EPOCHS[variant]
        recipes.muon(config)
    recipe(config)
    recipes.gentler(config)
    return config
