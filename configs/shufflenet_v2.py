"""ShuffleNetV2 on CIFAR-10."""

from configs import default, recipes

NETS = {width: f"shufflenet_v2_{width}_cifar" for width in ("x0_5", "x1_0", "x1_5", "x2_0")}
QUICK_EPOCHS = {"x0_5": 22, "x1_0": 6, "x1_5": 4, "x2_0": 2}
QUICK_WITH_MUON = ("x0_5", "x1_0")  # orthogonalising wider kernels takes more products than a step at 16 pixels


def get_config(words: str = ""):
    """The CIFAR net of the named width (default: x1_0), trained by a recipe of `recipes`."""
    config = default.get_config()
    variant, recipe = recipes.choose(words, NETS, "x1_0")
    config.model.name = NETS[variant]
    if recipe is recipes.quick:
        config.num_epochs = QUICK_EPOCHS[variant]
        if variant in QUICK_WITH_MUON:
            recipes.muon(config)
    recipe(config)
    return config
