"""The rules of the stand-in for a GPU, and that every line of the engine that is specific to CUDA runs on it."""

import ast
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_standin import GARBAGE, CudaStandIn, RaceError
from tiny_training import Net, batches, cuda_state

import fastkd
from fastkd import distributed
from fastkd.data.loader import Loader
from fastkd.data.resident import ResidentLoader
from fastkd.data.views import Views
from fastkd.distributed import ProcessGroup
from fastkd.engine import checkpoint
from fastkd.engine.epoch import train_epoch
from fastkd.engine.inference import evaluate, predict
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.runtime import Runtime
from fastkd.errors import FastkdError


def test_an_asynchronous_copy_arrives_once_somebody_waits_for_it(card):
    pinned, stream = torch.arange(4).pin_memory(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sent = pinned.to("cuda", non_blocking=True)
    copied = stream.record_event()
    sent.record_stream(torch.cuda.current_stream())
    assert not copied.query()
    assert sent.cpu().view(torch.uint8).unique().tolist() == [GARBAGE]
    torch.cuda.current_stream().wait_event(copied)
    assert sent.tolist() == [0, 1, 2, 3]
    assert copied.query()  # the host has waited for the stream that had waited for the event
    pinned.zero_()


def test_pinned_memory_may_be_overwritten_once_the_host_has_waited(card):
    pinned = torch.zeros(4).pin_memory()
    sent = pinned.to("cuda", non_blocking=True)
    sent + 1  # the device has waited; the host knows nothing of it
    with pytest.raises(RaceError, match="fill_: overwrites pinned memory"):
        pinned.fill_(1)
    torch.cuda.synchronize()
    pinned.fill_(1)
    assert sent.tolist() == [0] * 4


def test_a_copy_to_the_host_is_of_the_time_when_it_was_asked_for(card):
    value, host = torch.zeros(2, device="cuda"), torch.empty(2, pin_memory=True)
    host.copy_(value, non_blocking=True)
    value.fill_(7)
    assert host.tolist() != [0, 0]
    torch.cuda.synchronize()
    assert host.tolist() == [0, 0]


def test_host_and_device_do_not_mix(card):
    on_device = torch.ones(3, device="cuda")
    assert on_device.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        on_device + torch.ones(3)
    assert (on_device * torch.tensor(2.0)).tolist() == [2.0] * 3  # a number
    assert on_device[torch.tensor([0])].tolist() == [1.0]  # an index
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        on_device.numpy()
    assert on_device.cpu().numpy().tolist() == [1.0] * 3


def test_operations_that_wait_for_the_device_are_listed_and_may_be_forbidden(card):
    values = torch.tensor([1.0, 0.0], device="cuda")
    float(values[0])
    values.cpu()
    values[values > 0]
    values.nonzero()
    torch.ones(2).to("cuda")
    assert card.syncs == ["torch.tensor", "__float__", "cpu", "__getitem__", "nonzero", "to"]
    torch.cuda.set_sync_debug_mode("error")
    values.add_(1).sum()
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation: item"):
        values.sum().item()


def test_devices_follow_torchs_rules():
    with CudaStandIn("A100", count=2):
        with pytest.raises(ValueError, match="with a specified index"):
            torch.cuda.set_device(torch.device("cuda"))
        torch.cuda.set_device(1)
        assert torch.ones(1, device="cuda").device == torch.device("cuda", 1)
        assert torch.cuda.get_device_properties(0).total_memory == 80 << 30
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.set_device(2)


def captured(work, **options):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), **options):
        work()
    return graph


def test_a_graph_runs_nothing_while_captured_and_reads_its_memory_when_replayed(card):
    given, total, factor, results = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), 2.0, []

    def work():
        results.append(given * factor)
        total.add_(results[0])

    graph = captured(work)
    assert total.tolist() == [0] * 3
    assert results[0].cpu().view(torch.uint8).unique().tolist() == [GARBAGE]
    graph.replay()
    factor = 100.0  # a number of Python is that of the capture
    given.copy_(torch.tensor([5.0, 6.0, 7.0], device="cuda"))
    launches = card.launches
    graph.replay()
    assert card.launches == launches + 1
    assert results[0].tolist() == [10, 12, 14]
    assert total.tolist() == [12, 14, 16]
    given = torch.zeros(3, device="cuda")  # the memory of the capture was freed
    with pytest.raises(RaceError, match="memory that was freed"):
        graph.replay()


def test_a_graph_contains_the_backward_pass_and_random_numbers(card):
    weight, kept = torch.ones(4, device="cuda", requires_grad=True), torch.zeros(2, 4, device="cuda")

    def work():
        drawn = torch.rand(4, device="cuda")
        (weight * drawn).square().sum().backward()
        kept[0].copy_(drawn)
        kept[1].copy_(weight.grad)
        weight.grad = None

    torch.manual_seed(3)
    graph = captured(work)
    graph.replay()
    first = kept.clone()
    graph.replay()
    torch.manual_seed(3)
    for found in (first, kept):
        drawn = torch.rand(4)
        torch.testing.assert_close(found.cpu(), torch.stack([drawn, 2 * drawn**2]))


def test_what_a_capture_does_not_permit(card):
    device, host = torch.ones(3, device="cuda"), torch.ones(3).pin_memory()
    event = torch.cuda.current_stream().record_event()
    forbidden = {
        "item": lambda: device.sum().item(),
        "__getitem__": lambda: device[device > 0],
        "synchronize": torch.cuda.synchronize,
        "Event.synchronize": event.synchronize,
        "torch.tensor": lambda: torch.tensor(1.0, device="cuda"),
        "copy_ between": lambda: device.copy_(host, non_blocking=True),
        "uncaptured work": lambda: torch.cuda.current_stream().wait_event(event),
        "capturable is False": torch.optim.AdamW([device.clone().requires_grad_()], fused=True).step,
    }
    for what, work in forbidden.items():
        before = torch.cuda.current_stream()
        with torch.cuda.stream(before), pytest.raises(RuntimeError) as error:
            captured(work)
        errors = [error.value, error.value.__context__]
        assert any(what in str(one) for one in errors), what
        assert torch.cuda.current_stream() is before
        assert not torch.cuda.is_current_stream_capturing()


WHOLE = {"_Sender", "_one_ahead", "_copy_stream", "_check_kernels", "DeviceBuffers", "StepGraph", "_capture_stream"}
"""Functions and classes that nothing but CUDA uses."""


def cuda_lines(source: str) -> set[int]:
    """Return the first line of each statement that runs on CUDA only: in a branch for it, or after one for CPUs."""

    def is_for(test: ast.expr, device: str) -> bool:
        return ast.unparse(test).endswith(f".type == '{device}'")

    found: list[ast.stmt] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and is_for(node.test, "cuda"):
            found += node.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in WHOLE:
            found += node.body
        if isinstance(node, ast.FunctionDef):
            for number, one in enumerate(node.body):
                if isinstance(one, ast.If) and is_for(one.test, "cpu") and isinstance(one.body[-1], ast.Return):
                    found += node.body[number + 1 :]
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and "torch.cuda." in ast.unparse(node):
            found.append(node)
    inner = [one for statement in found for one in ast.walk(statement) if isinstance(one, ast.stmt)]
    return {
        one.lineno
        for one in inner
        if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))  # a docstring
        and not isinstance(one, ast.AnnAssign | ast.FunctionDef | ast.ClassDef)
    }


def use_everything(card: CudaStandIn, folder: Path, loader: Loader) -> None:
    """Do all that the engine and the process group do on a GPU."""
    state = cuda_state("fp16")
    lr_S = np.full(4, 0.1)
    train_epoch(state, batches(4), None, lr_S, log_every_steps=4, on_log=lambda *a: state.runtime.memory_bytes())
    failing = cuda_state(
        "fp32", graph=True, channels_last=False, clip=lambda scaler, optimizer: torch.ones(1, device="cuda").item()
    )
    for one in (cuda_state("fp32", graph=True), failing):
        assert one.graph.first_steps > 0
        train_epoch(one, batches(8), None, np.full(8, 0.1), log_every_steps=8, on_log=lambda *a: None)
    checkpoint.save(folder, 4, state.objective.student, state, None, {})
    checkpoint.restore(checkpoint.newest(folder), state.objective.student, state, None)
    resident = ResidentLoader(loader, np.arange(40), state.runtime.device)
    assert resident.nbytes < state.runtime.free_bytes() < card.card.memory
    assert len(list(prefetch_to_device(resident.batches(np.arange(40), last="pad", view=0), state.runtime))) == 10
    net = state.runtime.to_device(Net().eval())
    assert len(list(predict(state.runtime, net, batches(3)))) == 3
    assert 0 <= evaluate(state.runtime, net, batches(3)) <= 1
    group = ProcessGroup(rank=0, size=2, local_rank=0, local_size=1)
    choose = partial(Runtime.choose, channels_last=True, compile=False)
    choose("auto", "auto", group=group)
    for device, options in (("cuda:7", {}), ("cuda:0", {"group": group})):
        with pytest.raises(FastkdError):
            choose(device, "auto", **options)
    assert state.runtime.gpu == card.card.name
    assert (state.runtime.arithmetic, state.runtime.idle_gpus) == ("fp16", 0)
    assert distributed._own_gpu(group).index == 0
    card.architectures = ["sm_75"]
    with pytest.raises(FastkdError):
        choose("cuda", "auto")


def test_every_line_that_is_specific_to_cuda_runs(card, tmp_path, tiny):
    root, seen = Path(fastkd.__file__).parent, set()
    folders = {str(root / name) for name in ("engine", "data", "stages")} | {str(root / "distributed.py")}

    def trace(frame, event, argument):
        file = frame.f_code.co_filename
        if str(Path(file).parent) not in folders and file not in folders:
            return None
        seen.add((file, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        use_everything(card, tmp_path, Loader(tiny, "train", 4, views=Views("flip")))
    finally:
        sys.settrace(before)
    files = [file for name in ("engine", "data", "stages") for file in (root / name).glob("*.py")]
    lines = {(str(file), line) for file in files for line in cuda_lines(file.read_text())}
    assert len(lines) > 40
    assert sorted(lines - seen) == []
