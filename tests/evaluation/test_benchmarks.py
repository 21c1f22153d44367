"""The registry of benchmarks, and the benchmark of a data folder."""

import sys

import pytest

from dopsd.evaluation.benchmarks import BENCHMARKS, find_benchmark, load_benchmark


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_of_the_registry_is_there(name):
    benchmark = load_benchmark(name)
    assert callable(benchmark.replicate) and callable(benchmark.ask) and benchmark.metrics


def test_a_folder_of_plain_images_belongs_to_no_benchmark_and_imports_none(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "dopsd.pocket.benchmark", raising=False)
    (tmp_path / "0.png").write_bytes(b"")
    assert find_benchmark(tmp_path) is None
    assert "dopsd.pocket.benchmark" not in sys.modules


def test_a_folder_with_a_file_of_a_benchmarks_name_belongs_to_it(concept):
    assert find_benchmark(concept) is load_benchmark("pocket")
