"""The registries of models: every entry leads to something that opens."""

import pytest

from dopsd.methods import DOPSD, DPO, SFT
from dopsd.models import BUILT_IN, FAMILIES, PIPELINES, family_class, load_family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_under_its_own_name(name):
    assert family_class(name).name == name
    assert name in PIPELINES.values()


def test_every_pipeline_belongs_to_a_family():
    assert set(PIPELINES.values()) == set(FAMILIES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_model_opens_by_its_name(name):
    assert load_family(name).checkpoint.folder.is_dir()


def test_recommended_settings_follow_from_a_methods_traits(pocket, sdxl):
    assert load_family(str(sdxl("turbo"))).starting_points(DPO())["method.space"] == "noise"
    assert "method.space" not in load_family(str(sdxl("turbo"))).starting_points(DOPSD())
    for method in (DPO(), DOPSD()):
        assert load_family(str(sdxl("turbo"))).starting_points(method)["retention.space"] == "noise"
    klein = family_class("flux2_klein")
    rates = [
        klein.starting_points(pocket, each)["train.learning_rate"] for each in (DOPSD(), SFT())
    ]
    assert rates == [2e-5, 1e-4]
