"""The registries of models: every entry leads to something that opens."""

import pytest

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
