"""ShuffleNetV1 on CIFAR-10."""

from configs import default, recipes

GROUPS = (1, 2, 3, 4, 8)
QUICK_EPOCHS = {0.25: 17, 0.5: 12, 1.0: 6, 1.5: 3, 2.0: 1}  # by width, those of the paper's tables 2 and 5
# Number of groups and width: g3 for 1.0, g3_x0_5 for others
VARIANTS = {
    f"g{groups}" + (f"_x{width}".replace(".", "_") if width != 1 else ""): (groups, width)
    for groups in GROUPS
    for width in (1.0, 0.25, 0.5, 1.5, 2.0)
}


def get_config(words: str = ""):
    """The CIFAR net with a number of groups and a width, g3 where none is named; a recipe of `recipes`."""
    config = default.get_config()
    variant, recipe = recipes.choose(words, VARIANTS, "g3")
    groups, width = VARIANTS[variant]
    config.model.name = f"shufflenet_v1_g{groups}_cifar"
    if width != 1:
        config.model.width = width
    if recipe is recipes.quick:
        config.num_epochs = QUICK_EPOCHS[width]
        recipes.muon(config)
    recipe(config)
    return config
