"""Every configuration is complete, passes its check, and names a net that exists, in all variants and recipes."""

import collections
import importlib
import re

import pytest

from configs import default, finetune, imagenet, recipes
from jaxnets import augment, list_models, models, optim, settings, summary
from jaxnets.errors import UserError
from tests.slow import slow_after

VARIANTS = {
    "digits": ["", "x0_35"],
    "finetune": ["", *finetune.NETS],
    "imagenet": ["", *imagenet.NETS],
    "mnv1": ["", "x0_25", "x0_5", "x0_75", "x1_0"],
    "mnv2": ["", "x0_35", "x0_5", "x0_75", "x1_0", "x1_3", "x1_4"],
    "resnet": ["", "18", "34", "50", "101", "152"],
    "squeezenet": ["", "1_0", "1_1"],
    "shufflenet_v1": [
        "",
        *("g1", "g1_x0_25", "g1_x0_5", "g1_x1_5", "g1_x2_0", "g2", "g2_x0_25", "g2_x0_5", "g2_x1_5", "g2_x2_0"),
        *("g3", "g3_x0_25", "g3_x0_5", "g3_x1_5", "g3_x2_0", "g4", "g4_x0_25", "g4_x0_5", "g4_x1_5", "g4_x2_0"),
        *("g8", "g8_x0_25", "g8_x0_5", "g8_x1_5", "g8_x2_0"),
    ],
    "shufflenet_v2": ["", "x0_5", "x1_0", "x1_5", "x2_0"],
    "vgg": ["", "16", "16_bn", "19", "19_bn"],
}
FAMILIES = sorted(VARIANTS.keys() - {"digits", "finetune", "imagenet"})
WITHOUT_BATCH_NORM = [("squeezenet", "1_0"), ("squeezenet", "1_1"), ("vgg", "16"), ("vgg", "19")]


def quick_cases(name):
    return slow_after(1, [(name, variant) for variant in VARIANTS[name][1:]])


def load(name, words=""):
    return importlib.import_module(f"configs.{name}").get_config(*[words] if words else [])


def test_every_file_is_listed(repository):
    files = {path.stem for path in (repository / "configs").glob("*.py")}
    assert files == VARIANTS.keys() | {"default", "recipes"}


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, variants in VARIANTS.items() for v in variants])
def test_a_configuration_passes_and_has_the_fields_of_the_default(name, variant):
    config = load(name, variant)
    settings.check(config)
    fields = settings.flatten(config.to_dict())
    assert fields.keys() == settings.flatten(default.get_config().to_dict()).keys()
    model = settings.make_model(config, 10)
    if "x" in variant and name not in ("finetune", "imagenet"):
        assert model.width == float(variant.split("x")[1].replace("_", "."))
    if name == "shufflenet_v1" and variant:
        assert model.feature_group_count == int(variant.split("_")[0][1:])
    if name in ("resnet", "vgg") and variant:
        assert model.depth == int(variant.removesuffix("_bn"))
    assert config.image_size == models.default_image_size(config.model.name)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_variant_has_every_recipe_in_any_order(name, recipe):
    for variant in VARIANTS[name][1:]:
        config = load(name, f"{variant},{recipe}")
        assert config.to_dict() == load(name, f"{recipe}, {variant}").to_dict()
        assert config.model.to_dict() == load(name, variant).model.to_dict()
        settings.check(config)
    assert load(name, recipe).model.to_dict() == load(name).model.to_dict()
    assert (load(name, recipe).to_dict() == load(name).to_dict()) == (recipe == "default")


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name in FAMILIES for v in VARIANTS[name][1:]])
def test_the_reference_is_the_published_tables_recipe(name, variant):
    config = load(name, f"{variant},reference")
    gentler = (name, variant) in WITHOUT_BATCH_NORM
    assert (config.num_epochs, config.batch_size) == (200, 256)
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.nesterov) == ("sgd", 0.9, True)
    assert config.optimizer.learning_rate == pytest.approx(0.01 if gentler else 0.1)
    assert config.optimizer.weight_decay == 5e-4 and config.optimizer.decay_vectors
    assert config.std == (0.2023, 0.1994, 0.2010)
    assert config.augment.to_dict() == {"crop_padding": 4, "flip": True, "cutout": 0, "mixup": 0.0, "cutmix": 0.0}
    rates = optim.make_schedule(config.schedule.name, 1.0, steps_per_epoch=195, num_epochs=200, warmup_epochs=0.0)
    assert config.schedule.warmup_epochs == 0 and rates(0) == 1 and rates(195 * 100) == pytest.approx(0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tutorial_is_ten_epochs_of_plain_adam(name):
    config = load(name, "tutorial")
    assert (config.num_epochs, config.batch_size) == (10, 148)
    # AdamW without decay is Adam.
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay) == ("adamw", 1e-4, 0)
    assert config.schedule.name == "constant" and config.schedule.warmup_epochs == 0
    assert not any(config.augment.to_dict().values())


def sizes_of(config):
    """Sides of the images of a run's epochs."""
    epochs = range(config.num_epochs)
    return [augment.progressive_size(config.progressive_sizes, config.image_size, at, len(epochs)) for at in epochs]


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name in FAMILIES for v in VARIANTS[name][1:]])
def test_quick_is_short_and_ends_at_the_size_that_is_evaluated(name, variant):
    config = load(name, f"{variant},quick")
    sizes = sizes_of(config)
    assert 1 <= config.num_epochs <= 60 and config.eval_every_epochs >= config.num_epochs
    assert sizes == sorted(sizes) and sizes[-1] == config.image_size


@pytest.mark.parametrize(("name", "variant"), [case for name in FAMILIES for case in quick_cases(name)])
def test_quick_computes_what_ten_minutes_are_enough_for(name, variant):
    """Forward; wide nets compute more in that time, narrow ones are bound by memory."""
    config = load(name, f"{variant},quick")
    net = {field: value for field, value in config.model.items() if value is not None} | {"num_classes": 10}
    del net["name"], net["dtype"]
    images = 50_000 if config.train_split == "train" else 500 * int(re.search(r"(\d+)%", config.train_split)[1])
    counts = collections.Counter(sizes_of(config))
    macs = sum(count * summary.summarize(config.model.name, size, **net).macs for size, count in counts.items())
    assert 1e12 < images * macs < 80e12


@pytest.mark.parametrize("name", ["mnv2", "shufflenet_v1", "shufflenet_v2", "squeezenet"])
def test_quick_is_muon_where_it_gives_more(name):
    assert load(name, "quick").optimizer.name == "muon" and load("mnv1", "quick").optimizer.name == "sgd"


@pytest.mark.parametrize("name", imagenet.NETS)
def test_finetuning_is_gentle_and_sees_what_published_nets_saw(name):
    config, published = load("finetune", name), load("imagenet", name)
    for field in ("image_size", "crop", "mean", "std", "augment"):
        assert config[field] == published[field], field
    assert config.crop_area > published.crop_area
    assert config.init_from and config.optimizer.learning_rate <= 1e-3 and config.num_epochs <= 20


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name in FAMILIES for v in VARIANTS[name][1:]])
def test_the_default_is_muon_at_a_lower_rate_where_nothing_normalises(name, variant):
    config = load(name, variant)
    assert (config.num_epochs, config.batch_size, config.optimizer.name) == (40, 256, "muon")
    assert (config.optimizer.weight_decay, config.augment.cutout, config.label_smoothing) == (0.05, 8, 0.1)
    assert config.progressive_sizes == ()  # images that grow cost a point
    assert config.optimizer.learning_rate == (0.005 if (name, variant) in WITHOUT_BATCH_NORM else 0.02)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_unknown_word_is_refused_with_those_that_exist(name):
    with pytest.raises(UserError, match=f"'x9'.*{VARIANTS[name][-1]}.*default"):
        load(name, "x9")
    with pytest.raises(UserError, match="''"):
        load(name, ",")


@pytest.mark.parametrize("name", VARIANTS)
def test_words_that_contradict_each_other_are_refused(name):
    known = VARIANTS[name][1:]
    if len(known) > 1:
        with pytest.raises(UserError, match=f"{known[0]} and {known[1]} contradict each other"):
            load(name, f"{known[0]},{known[1]}")
    if name in FAMILIES:
        with pytest.raises(UserError, match="quick and tutorial contradict each other"):
            load(name, f"quick,{known[0]},tutorial")
    assert load(name, f"{known[0]},{known[0]}").to_dict() == load(name, known[0]).to_dict()


def test_imagenet_has_every_net_for_its_images_but_googlenet():
    large = {name for name in list_models() if models.default_image_size(name) == 224}
    assert large - imagenet.NETS.keys() == {"googlenet"}
    for net in imagenet.NETS:
        config = load("imagenet", net)
        assert config.model.name == net and config.crop and config.crop_area > 0 and not config.augment.crop_padding


def test_imagenets_recipes_are_the_papers():
    v1, v2 = load("imagenet", "mobilenet_v1"), load("imagenet", "mobilenet_v2")
    for config in (v1, v2):
        assert (config.optimizer.name, config.optimizer.beta2, config.optimizer.weight_decay) == ("rmsprop", 0.9, 4e-5)
        assert config.optimizer.learning_rate == 0.045
    assert not v1.optimizer.decay_depthwise and v2.optimizer.decay_depthwise
    assert (v2.optimizer.momentum, v2.schedule.decay, v2.batch_size) == (0.9, 0.98, 96)
    for net in ("shufflenet_v1_g3", "shufflenet_v2_x1_0"):
        config = load("imagenet", net)
        assert config.schedule.name == "linear" and config.optimizer.weight_decay == 4e-5
        assert (config.optimizer.learning_rate, config.batch_size, config.label_smoothing) == (0.5, 1024, 0.1)
        assert config.num_epochs * 1_281_167 // config.batch_size == pytest.approx(300_000, rel=2e-3)
    config = load("imagenet", "squeezenet1_0")
    assert (config.schedule.name, config.optimizer.learning_rate) == ("linear", 0.04)


def test_the_default_says_what_every_field_is(repository):
    """Each field stands once, with a comment."""
    lines = (repository / "configs" / "default.py").read_text().splitlines()
    fields = [line for line in lines if line.strip().startswith("config.") and "ConfigDict()" not in line]
    names = [line.split("=")[0].strip().removeprefix("config.") for line in fields]
    assert sorted(names) == sorted(settings.flatten(default.get_config().to_dict()))
    assert [line for line in fields if "#" not in line] == []
