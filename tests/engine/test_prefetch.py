import contextlib
import gc
from collections.abc import Generator
from unittest import mock

import cuda_standin
import numpy as np
import pytest
import torch
from tiny_training import CPU, Batch, Net, batches

from fastkd.engine.inference import predict
from fastkd.engine.prefetch import BUFFERS, DeviceBuffers, prefetch_to_device
from fastkd.engine.runtime import Runtime


def test_memory_format_follows_the_choice():
    batch = next(batches(1))
    assert next(prefetch_to_device(batches(1), CPU)).images.is_contiguous(memory_format=torch.channels_last)
    nchw = Runtime.choose("cpu", "fp32", channels_last=False, compile=False)
    fed = next(prefetch_to_device(batches(1), nchw))
    assert fed.images.is_contiguous()
    torch.testing.assert_close(fed.images, batch.images)


def test_closing_the_prefetcher_closes_the_loader():
    ended = []

    def loader():
        try:
            yield from batches(3)
        finally:
            ended.append(True)

    fed = prefetch_to_device(loader(), CPU)
    next(fed)
    fed.close()
    assert ended


def reused(expected: list[Batch]) -> Generator[Batch, None, None]:
    """Yield batches in the same buffers, as the loader does."""
    first = expected[0]
    buffers = [torch.empty_like(t) for t in (first.images, first.labels, first.sample_ids, *first.stored)]
    for batch in expected:
        tensors = (batch.images, batch.labels, batch.sample_ids, *batch.stored)
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        images, labels, sample_ids, *stored = buffers
        yield Batch(images, labels, sample_ids, batch.valid, tuple(stored))


def cuda_runtime() -> Runtime:
    return Runtime.choose("cuda", "fp32", channels_last=True, compile=False)


def test_batches_reach_cuda_whole_and_in_order_though_buffers_are_reused(cuda):
    runtime, expected = cuda_runtime(), list(batches(9))
    for fed, batch in zip(prefetch_to_device(reused(expected), runtime), expected, strict=True):
        torch.cuda._sleep(1_000_000)
        for ours, theirs in zip(fed.tensors(), (*batch[:3], *batch.stored), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)


def test_predictions_on_cuda_are_those_of_the_cpu(cuda):
    torch.manual_seed(0)
    net, runtime = Net().eval(), cuda_runtime()
    expected = list(predict(CPU, net, batches(5, valid=3)))
    found = list(predict(runtime, runtime.to_device(net), batches(5, valid=3)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-2, atol=1e-3)  # TF32 on a GPU
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.stored[0], theirs.stored[0])


def test_copies_to_cuda_are_asynchronous_and_use_one_stream(card):
    """A stream has memory of its own: one per epoch would fill the device."""
    runtime, before = cuda_runtime(), len(card.syncs)
    for _ in range(3):
        assert len(list(prefetch_to_device(batches(4), runtime))) == 4
    assert len(card.streams) == 1
    assert card.copies == {"to_device": 3 * 4 * 4, "to_host": 0}
    assert card.syncs[before:] == []


def test_without_waiting_for_its_copy_a_batch_would_be_garbage(card):
    with mock.patch.object(cuda_standin.Event, "synchronize"):
        fed = next(prefetch_to_device(batches(1), cuda_runtime()))
    assert fed.images.unique().tolist() == [cuda_standin.GARBAGE]
    assert not torch.equal(fed.labels.cpu(), next(batches(1)).labels)


def pinned(expected: list[Batch]) -> Generator[Batch, None, None]:
    """Yield batches without stored rows in the same pinned buffers: FFCV's are, on a machine with a GPU."""
    arrays = [t.pin_memory().numpy() for t in expected[0][:3]]
    for batch in expected:
        for array, tensor in zip(arrays, batch[:3], strict=True):
            array[:] = tensor.numpy()
        yield Batch(*map(torch.from_numpy, arrays), batch.valid)


def test_pinned_buffers_of_the_loader_are_not_copied_on_the_host(card):
    expected = list(batches(5))
    for fed, batch in zip(prefetch_to_device(pinned(expected), cuda_runtime()), expected, strict=True):
        assert card.live_bytes(pinned=True) == sum(t.nbytes for t in batch[:3])
        for ours, theirs in zip(fed.tensors(), batch[:3], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)


def test_without_waiting_for_the_copy_the_loader_would_overwrite_a_batch(card):
    expected = list(batches(2))
    with mock.patch.object(cuda_standin.Event, "synchronize"):
        fed = next(prefetch_to_device(pinned(expected), cuda_runtime()))
    torch.cuda.synchronize()  # the copy is made now
    assert fed.sample_ids.tolist() == expected[1].sample_ids.tolist()


def test_without_waiting_for_the_copy_pinned_memory_would_be_overwritten(card):
    with mock.patch.object(cuda_standin.Event, "synchronize"):
        fed = prefetch_to_device(batches(3), cuda_runtime())
        with pytest.raises(cuda_standin.RaceError, match="overwrites pinned memory"):
            next(fed)


def test_without_record_stream_memory_could_be_given_away_while_a_copy_is_under_way(card):
    """The training is interrupted while a batch is copied, and its memory is freed."""
    for patched in (torch.Tensor.record_stream, lambda tensor, stream: None):
        expected = pytest.raises(cuda_standin.RaceError, match="without record_stream")
        with mock.patch.object(torch.Tensor, "record_stream", patched):
            fed = prefetch_to_device(batches(3), cuda_runtime())
            next(fed)
            fed.close()
            del fed
            gc.collect()
            with expected if patched is not torch.Tensor.record_stream else contextlib.nullcontext():
                torch.zeros(3, device="cuda")


def test_batches_lie_at_the_same_addresses_in_all_epochs(card):
    buffers, addresses = DeviceBuffers(), []
    for _ in range(2):
        for fed in prefetch_to_device(batches(6), cuda_runtime(), buffers):
            assert fed.static
            addresses.append(fed.images.data_ptr())
    assert len(set(addresses)) == BUFFERS
    assert addresses[:BUFFERS] == addresses[BUFFERS : 2 * BUFFERS]


def test_without_waiting_results_on_the_host_would_be_garbage(card, monkeypatch):
    runtime = cuda_runtime()
    tensor = torch.ones(4, dtype=torch.uint8, device=runtime.device)
    assert runtime.to_host(tensor)().tolist() == [1] * 4
    monkeypatch.setattr(cuda_standin.Event, "synchronize", lambda self: None)
    assert runtime.to_host(tensor)().tolist() == [cuda_standin.GARBAGE] * 4
