"""Predictions for several devices, compared with values computed by hand."""

import pytest

from fastkd.bench.scaling import NETWORK_HOP_S, NODE_HOP_S, Cluster
from fastkd.errors import InputError


def test_an_all_reduce_takes_bandwidth_and_latency():
    """46.8 MB, the float32 gradients of a ResNet-18, on 8 and on 16 devices."""
    assert Cluster(8).all_reduce_s(46_800_000) == pytest.approx(2 * 7 / 8 * 46.8e6 / 450e9 + 14 * 3.4e-6)
    assert Cluster(8).all_reduce_s(46_800_000) == pytest.approx(229.6e-6, rel=1e-3)
    two = Cluster(8, 2).all_reduce_s(46_800_000)  # 8 × 50 GB/s between nodes: less than the 450 within
    assert two == pytest.approx(2 * 15 / 16 * 46.8e6 / 400e9 + 28 * NODE_HOP_S + 2 * NETWORK_HOP_S)
    assert Cluster(1).all_reduce_s(10**9) == 0


def test_the_slowest_link_is_the_bus():
    """Within a node the network is not used."""
    assert Cluster(8).bus_bytes_s == 450e9
    assert Cluster(8, 1, network_gb_s=1).bus_bytes_s == 450e9
    assert Cluster(4, 2).bus_bytes_s == 200e9
    assert Cluster(1, 2, network_gb_s=12.5).bus_bytes_s == 12.5e9
    assert Cluster(16, 2).bus_bytes_s == 450e9


def test_the_rate_of_all_devices_includes_the_all_reduce():
    """It is bounded by loading."""
    cluster = Cluster(4, node_gb_s=1.0, cores_per_gpu=2)
    # A step of 32 images at 100 images/s: 0.32 s; 2·3/4·80 MB at 1 GB/s: 0.12 s; six hops.
    step_s = 0.32 + 0.12 + 6 * 3.4e-6
    assert cluster.rate(100.0, 32, 80_000_000, 1000.0) == pytest.approx(4 * 32 / step_s)
    assert cluster.rate(100.0, 32, 80_000_000, 30.0) == 4 * 2 * 30


def test_loading_is_compared_with_what_the_devices_need():
    """In images/s and in cores."""
    cluster = Cluster(8, 2, cores_per_gpu=14)
    slow = cluster.loading(5000.0, 300.0)
    assert slow.startswith(
        "loading is the limit: the 8 devices of a node need 40,000 images/s; with 14 cores per device it loads"
    )
    assert "loads 33,600" in slow
    assert "16.7 cores per device would be enough" in slow
    assert cluster.loading(5000.0, 400.0).startswith("loading is not the limit")


def test_a_batch_that_cannot_be_divided_is_an_error():
    """The message names the recipe's key."""
    assert Cluster(8, 2).local_batch(1024) == 64
    with pytest.raises(InputError, match=r"train\.batch_size=100: .* 2 nodes of 4 devices; choose a multiple of 8"):
        Cluster(4, 2).local_batch(100)
