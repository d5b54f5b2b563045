"""ShuffleNetV1 on CIFAR-10."""

from configs import default, recipes

GROUPS = (1, 2, 3, 4, 8)
QUICK_EPOCHS = {0.25: 17, 0.5: 12, 1.0: 6, 1.5: 3, 2.0: 1}  # by width; the widths of the paper's tables 2 and 5
# Number of groups and width by name: g3 is 3 groups at width 1.0, g3_x0_5 at 0.5
VARIANTS = {
    f"g{groups}" + (f"_x{width}".replace(".", "_") if width != 1 else ""): (groups, width)
    for groups in GROUPS
    for width in (1.0, 0.25, 0.5, 1.5, 2.0)
}


def get_config(words: str = ""):
    """The CIFAR net with the named number of groups and width (default: g3), trained by a recipe of `recipes`."""
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
