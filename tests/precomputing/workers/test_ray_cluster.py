import socket
import sys
from types import ModuleType

import pytest

from dpo_cache.errors import OptionError
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.precomputing.workers.ray_cluster import (
    Pool,
    check_pool,
    connected,
    import_ray,
    plan_pool,
)

ONE_GPU = {"CPU": 16.0, "GPU": 1.0}
EIGHT_GPUS = {"CPU": 64.0, "GPU": 8.0}
CPUS = {"CPU": 8.0}


def plan(nodes: list[dict[str, float]], *, needs_gpu: bool = False, **options: float) -> Pool:
    given = PrecomputeOptions(model="m", dataset="d", cache="c", ray="auto", **options)
    return plan_pool(given, nodes, needs_gpu=needs_gpu)


@pytest.mark.parametrize(
    ("nodes", "needs_gpu", "options", "expected"),
    [
        ([ONE_GPU], True, {}, Pool(1, 1, 1.0, 1.0)),
        ([EIGHT_GPUS, ONE_GPU, CPUS], True, {}, Pool(9, 9, 1.0, 1.0)),
        ([EIGHT_GPUS] * 2, True, {"gpus_per_worker": 4}, Pool(4, 4, 4.0, 1.0)),
        ([EIGHT_GPUS], True, {"gpus_per_worker": 3}, Pool(2, 2, 3.0, 1.0)),
        ([ONE_GPU], True, {"gpus_per_worker": 0.5}, Pool(2, 2, 0.5, 1.0)),
        ([EIGHT_GPUS], True, {"cpus_per_worker": 32}, Pool(2, 2, 1.0, 32.0)),
        ([EIGHT_GPUS], True, {"num_workers": 3}, Pool(3, 3, 1.0, 1.0)),
        ([], True, {}, Pool(1, 1, 1.0, 1.0)),  # of a cluster that has yet to grow
        ([CPUS], False, {}, Pool(1, 1, 0.0, 8.0)),
        ([CPUS, {"CPU": 4.0}], False, {}, Pool(3, 3, 0.0, 4.0)),
        ([CPUS], False, {"num_workers": 2}, Pool(2, 2, 0.0, 4.0)),
        ([CPUS], False, {"num_workers": 3}, Pool(3, 3, 0.0, 2.0)),
        ([CPUS, CPUS], False, {"num_workers": 4}, Pool(4, 4, 0.0, 4.0)),
        ([CPUS], False, {"cpus_per_worker": 2}, Pool(4, 4, 0.0, 2.0)),
        ([CPUS], False, {"min_workers": 2}, Pool(2, None, 0.0, 4.0)),
        ([CPUS], False, {"max_workers": 4}, Pool(1, 4, 0.0, 2.0)),
        ([CPUS], False, {"min_workers": 2, "max_workers": 4, "cpus_per_worker": 1}, Pool(2, 4, 0.0, 1.0)),
    ],
)
def test_workers_by_the_nodes_and_the_options(
    nodes: list[dict[str, float]], needs_gpu: bool, options: dict[str, float], expected: Pool
) -> None:
    assert plan(nodes, needs_gpu=needs_gpu, **options) == expected


def test_no_worker_without_a_unit() -> None:
    assert Pool(4, 8, 1.0, 1.0).at_most(6) == Pool(4, 6, 1.0, 1.0)
    assert Pool(4, None, 1.0, 1.0).at_most(3) == Pool(3, 3, 1.0, 1.0)


def test_a_pool_in_words() -> None:
    assert Pool(1, 1, 0.0, 2.0).describe() == "1 worker with 2 CPUs each"
    assert Pool(1, None, 0.0, 1.0).describe() == "at least 1 worker with 1 CPU each"
    assert Pool(2, 4, 2.0, 1.0).describe() == "2 to 4 workers with 2 GPUs and 1 CPU each"
    assert Pool(2, None, 0.5, 1.0).describe() == "at least 2 workers with 0.5 GPU and 1 CPU each"


def test_a_pool_that_does_not_fit() -> None:
    remarks = list[str]()
    check_pool(Pool(2, 4, 0.0, 4.0), [CPUS], "local", remarks.append)
    check_pool(Pool(3, 4, 0.0, 4.0), [CPUS], "auto", remarks.append)
    assert remarks == [
        "3 workers with 4 CPUs each do not fit on the cluster, 2 do; the others start when it grows. Its nodes "
        "have 8 CPUs and 0 GPUs."
    ]
    with pytest.raises(OptionError, match="1 worker with 1 GPU and 1 CPU each do not fit on this machine, "):
        check_pool(Pool(1, 1, 1.0, 1.0), [CPUS], "local", remarks.append)


def test_ray_that_is_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        OptionError, match=r'cannot be imported.*\n.*pip install "dpo-cache\[ray\]".*2\.55,<2\.64'
    ):
        import_ray()
    for version in ("2.54.1", "2.64.0", "3.0.0"):
        fake = ModuleType("ray")
        fake.__version__ = version
        fake.__path__ = []
        fake.data = ModuleType("ray.data")
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.setitem(sys.modules, "ray.data", fake.data)
        with pytest.raises(OptionError, match=f"Ray {version} is not supported"):
            import_ray()


def test_ray_clients_are_refused() -> None:
    with pytest.raises(OptionError, match="does not run through a Ray client"), connected("ray://head:10001"):
        pass


@pytest.mark.parametrize("is_variable", [False, True])
def test_an_address_where_nobody_answers(is_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    if is_variable:
        monkeypatch.setenv("RAY_ADDRESS", place)
    address = "auto" if is_variable else place
    with (
        pytest.raises(OptionError, match=f"`ray` {address}: no connection to a Ray cluster .*refused"),
        connected(address),
    ):
        pass
