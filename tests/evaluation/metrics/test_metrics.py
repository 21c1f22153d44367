"""The registry of metrics."""

import pytest

from dopsd.evaluation.metrics import METRICS, load_attribute


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_the_registry_is_there(name):
    assert callable(load_attribute(METRICS[name].attribute))
