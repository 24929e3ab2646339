"""From what one device does to what several would do: arithmetic alone, which has never been checked on GPUs.

A step of W devices is taken for a step at the local batch, measured on one, and after it an all-reduce of the gradients
round a ring, as nccl-tests' PERFORMANCE.md and NCCL's own model (src/graph/tuning.cc) count it: 2·(W−1)/W times their
bytes over the bus's bandwidth, and a latency for each of its 2·(W−1) hops. In truth most of it goes on while the
backward pass still computes, so that this is an upper bound of what it costs.
"""

from dataclasses import dataclass

from fastkd.errors import InputError

NODE_GB_S = 450.0  # each way: NVLink of an H100 SXM5 has 900 GB/s both ways together (NVIDIA H100 data sheet)
NETWORK_GB_S = 50.0  # a device's own ConnectX-7 at 400 Gb/s, as a DGX H100 has eight (NVIDIA DGX BasePOD, components)
CORES_PER_GPU = 14  # 112 cores for eight devices (likewise)
NODE_HOP_S, NETWORK_HOP_S = 3.4e-6, 9.6e-6  # hwLat of NCCL's src/graph/tuning.cc: ring, simple, by NVLink and network


@dataclass(frozen=True)
class Cluster:
    """Several devices, and what lies between them.

    Attributes
    ----------
    gpus, nodes
        Devices of a node, and nodes.
    node_gb_s
        GB/s that a device sends to its neighbour in the node.
    network_gb_s
        GB/s that it sends to other nodes; all devices of a node send at once.
    cores_per_gpu
        Loader threads that a device may have.
    """

    gpus: int
    nodes: int = 1
    node_gb_s: float = NODE_GB_S
    network_gb_s: float = NETWORK_GB_S
    cores_per_gpu: int = CORES_PER_GPU

    @property
    def devices(self) -> int:
        """W."""
        return self.gpus * self.nodes

    def __str__(self) -> str:
        if self.nodes == 1:
            return f"{self.gpus} devices"
        return f"{self.nodes} nodes of {self.gpus} device{'s' * (self.gpus > 1)}"

    def local_batch(self, batch_size: int) -> int:
        """Return a device's share of a batch.

        Raises
        ------
        InputError
            The batch cannot be shared equally.
        """
        if batch_size % self.devices:
            raise InputError(
                f"train.batch_size={batch_size}: {self} cannot share it equally; give a multiple of {self.devices}"
            )
        return batch_size // self.devices

    @property
    def bus_bytes_s(self) -> float:
        """Bytes/s of the slowest part of the ring: between nodes each of a node's devices carries a ring of its own."""
        network = self.gpus * self.network_gb_s if self.nodes > 1 else float("inf")
        return 1e9 * min(self.node_gb_s, network)

    def all_reduce_s(self, count: int) -> float:
        """Return the seconds of an all-reduce of `count` bytes."""
        devices, hops, between = self.devices, 2 * (self.devices - 1), 2 * (self.nodes - 1)
        latency = (hops - between) * NODE_HOP_S + between * NETWORK_HOP_S
        return 2 * (devices - 1) / devices * count / self.bus_bytes_s + latency

    def rate(self, one: float, local_batch: int, gradient_bytes: int, loader_thread: float) -> float:
        """Return the images/s that all devices train on.

        Parameters
        ----------
        one
            Images/s of one device at the local batch.
        loader_thread
            Images/s of one loader thread: the devices take no more than their cores give.
        """
        step_s = local_batch / one + self.all_reduce_s(gradient_bytes)
        return self.devices * min(local_batch / step_s, self.cores_per_gpu * loader_thread)

    def loading(self, one: float, loader_thread: float) -> str:
        """Say whether a node's cores load what its devices would train on, in images/s each."""
        wanted, loaded = self.gpus * one, self.gpus * self.cores_per_gpu * loader_thread
        verdict = "loading is not the limit" if loaded >= wanted else "loading is the limit"
        return (
            f"{verdict}: a node's {self.gpus} devices want {wanted:,.0f} images/s, and its {self.cores_per_gpu} cores "
            f"a device load {loaded:,.0f}, at the {loader_thread:,.0f} of a loader thread here; "
            f"{wanted / self.gpus / loader_thread:,.1f} cores a device would do"
        )
