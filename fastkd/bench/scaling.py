"""Predict the training speed of several devices from that of one. Arithmetic only, never checked on GPUs.

A step of W devices takes as long as a step at the local batch size, measured on one device, plus a ring all-reduce of
the gradients (nccl-tests, PERFORMANCE.md; NCCL, src/graph/tuning.cc): 2·(W−1)/W of their bytes over the bus bandwidth,
and the latency of 2·(W−1) hops. In practice most of the all-reduce overlaps with the backward pass, so this is an upper
bound.
"""

from dataclasses import dataclass

from fastkd.bench.measurement import plural
from fastkd.errors import InputError

NODE_GB_S = 450.0  # per direction: NVLink of an H100 SXM5 has 900 GB/s in total (NVIDIA H100 data sheet)
NETWORK_GB_S = 50.0  # one ConnectX-7 at 400 Gb/s per device, as in a DGX H100 (NVIDIA DGX BasePOD, components)
CORES_PER_GPU = 14  # 112 cores for eight devices, as in a DGX H100
NODE_HOP_S, NETWORK_HOP_S = 3.4e-6, 9.6e-6  # hwLat in NCCL's src/graph/tuning.cc: ring, simple; NVLink and network


@dataclass(frozen=True)
class Cluster:
    """Several devices and their interconnect.

    Attributes
    ----------
    gpus, nodes
        Devices per node, and number of nodes.
    node_gb_s
        GB/s from a device to its neighbour in the node.
    network_gb_s
        GB/s from a device to other nodes; all devices of a node send at the same time.
    cores_per_gpu
        Loader threads per device.
    """

    gpus: int
    nodes: int = 1
    node_gb_s: float = NODE_GB_S
    network_gb_s: float = NETWORK_GB_S
    cores_per_gpu: int = CORES_PER_GPU

    @property
    def devices(self) -> int:
        """Number of devices, W."""
        return self.gpus * self.nodes

    def __str__(self) -> str:
        if self.nodes == 1:
            return f"{self.gpus} devices"
        return f"{self.nodes} nodes of {plural(self.gpus, 'device')}"

    def local_batch(self, batch_size: int) -> int:
        """Return the number of images per device.

        Raises
        ------
        InputError
            The batch cannot be divided equally.
        """
        if batch_size % self.devices:
            raise InputError(
                f"train.batch_size={batch_size}: cannot be divided equally among {self}; choose a multiple of "
                f"{self.devices}"
            )
        return batch_size // self.devices

    @property
    def bus_bytes_s(self) -> float:
        """Bytes/s of the slowest link of the ring; between nodes, each device of a node carries a separate ring."""
        network = self.gpus * self.network_gb_s if self.nodes > 1 else float("inf")
        return 1e9 * min(self.node_gb_s, network)

    def all_reduce_s(self, size: int) -> float:
        """Return the seconds of an all-reduce of `size` bytes."""
        hops, network_hops = 2 * (self.devices - 1), 2 * (self.nodes - 1)
        latency = (hops - network_hops) * NODE_HOP_S + network_hops * NETWORK_HOP_S
        return hops / self.devices * size / self.bus_bytes_s + latency

    def rate(self, one: float, local_batch: int, gradient_bytes: int, loader_thread: float) -> float:
        """Return the images/s of all devices together.

        Parameters
        ----------
        one
            Images/s of one device at the local batch size.
        loader_thread
            Images/s of one loader thread, which bounds what the cores can load.
        """
        step_s = local_batch / one + self.all_reduce_s(gradient_bytes)
        return self.devices * min(local_batch / step_s, self.cores_per_gpu * loader_thread)

    def loading(self, one: float, loader_thread: float) -> str:
        """Return a sentence on whether the cores of a node can load as many images/s as its devices train on."""
        needed, loaded = self.gpus * one, self.gpus * self.cores_per_gpu * loader_thread
        verdict = "loading is not the limit" if loaded >= needed else "loading is the limit"
        return (
            f"{verdict}: the {plural(self.gpus, 'device')} of a node need {needed:,.0f} images/s; with "
            f"{plural(self.cores_per_gpu, 'core')} per device it loads {loaded:,.0f} ({loader_thread:,.0f} per loader "
            f"thread here). {needed / self.gpus / loader_thread:,.1f} cores per device would be enough"
        )
