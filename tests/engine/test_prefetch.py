import numpy as np
import pytest
import torch
from tiny_training import CPU, Batch, Net, batches

from fastkd.engine.inference import predict
from fastkd.engine.prefetch import prefetch_to_device
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


@pytest.mark.gpu
def test_batches_reach_cuda_whole_and_in_order_though_buffers_are_used_again():
    runtime = Runtime.choose("cuda", "fp32", channels_last=True, compile=False)
    expected = list(batches(9))
    buffers = [torch.empty_like(t) for t in (expected[0].images, expected[0].labels, expected[0].sample_ids)]

    def reusing():
        for batch in expected:
            for buffer, tensor in zip(buffers, (batch.images, batch.labels, batch.sample_ids), strict=True):
                buffer.copy_(tensor)
            yield Batch(*buffers, 4, batch.stored)

    for fed, batch in zip(prefetch_to_device(reusing(), runtime), expected, strict=True):
        torch.cuda._sleep(1_000_000)
        for ours, theirs in zip(fed.tensors(), (*batch[:3], *batch.stored), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)
    logits = np.concatenate([p.logits for p in predict(runtime, runtime.to_device(Net().eval()), batches(5, valid=3))])
    assert logits.shape == (15, 3)
