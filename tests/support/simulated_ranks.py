"""An evaluation that is dealt to simulated ranks, one thread each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from tlx.tasks import Ranks


def on_ranks(size, evaluate, count, batch=3):
    """What each rank returns of ``evaluate(ranks, batches)``.

    Args:
        count: samples; rank r has those at r, r + size ..., in batches of positions.
    """
    barrier, box = threading.Barrier(size), [None] * size

    def meet(rank, given, put_together):
        box[rank] = given
        barrier.wait(timeout=20)
        together = put_together(list(box))
        barrier.wait(timeout=20)
        return together

    def one(rank):
        share = list(range(rank, count, size))[::-1]  # in an order of its own
        batches = [share[i : i + batch] for i in range(0, len(share), batch)]
        ranks = Ranks(
            sum=lambda tensor: tensor.copy_(meet(rank, tensor.clone(), sum)),
            gather=lambda given: meet(rank, given, list),
        )
        return evaluate(ranks, batches)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
