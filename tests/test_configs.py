"""Every configuration is complete, passes its check, and names a net that exists, in all its variants."""

import importlib

import pytest

from configs import default
from jaxnets import settings

VARIANTS = {
    "digits": [None],
    "mnv1": [None, "x0_25", "x0_5", "x0_75", "x1_0"],
    "mnv2": [None, "x0_5", "x0_75", "x1_0", "x1_4"],
    "squeezenet": [None, "1_0", "1_1"],
    "shufflenet_v1": [None, "g1", "g2", "g3", "g4", "g8"],
    "shufflenet_v2": [None, "x0_5", "x1_0", "x1_5", "x2_0"],
}


def test_every_file_is_listed(repository):
    assert {path.stem for path in (repository / "configs").glob("*.py")} == VARIANTS.keys() | {"default"}


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, variants in VARIANTS.items() for v in variants])
def test_a_configuration_passes_and_has_the_fields_of_the_default(name, variant):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config() if variant is None else module.get_config(variant)
    settings.check(config)
    fields = settings.flatten(config.to_dict())
    assert fields.keys() == settings.flatten(default.get_config().to_dict()).keys()
    model = settings.make_model(config, 10)
    if variant and variant.startswith("x"):
        assert model.width == float(variant[1:].replace("_", "."))
    if variant and variant.startswith("g"):
        assert model.feature_group_count == int(variant[1:])


@pytest.mark.parametrize("name", [name for name, variants in VARIANTS.items() if len(variants) > 1])
def test_an_unknown_variant_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=f"'x9'.*{VARIANTS[name][-1]}"):
        importlib.import_module(f"configs.{name}").get_config("x9")


def test_the_default_says_what_every_field_is(repository):
    """Each field stands once, with a comment."""
    lines = (repository / "configs" / "default.py").read_text().splitlines()
    fields = [line for line in lines if line.strip().startswith("config.") and "ConfigDict()" not in line]
    names = [line.split("=")[0].strip().removeprefix("config.") for line in fields]
    assert sorted(names) == sorted(settings.flatten(default.get_config().to_dict()))
    assert [line for line in fields if "#" not in line] == []
