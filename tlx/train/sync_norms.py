"""BatchNorm over all ranks: its statistics are of what every rank computes at that moment (``loop.sync_batchnorm``)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlx.base.errors import UserError
from tlx.ranks.collectives import World


def synchronise(net: nn.Module, world: World) -> None:
    """Makes every BatchNorm of `net` a SyncBatchNorm, in place; on one rank it computes what it did before.

    torch's SyncBatchNorm is of BatchNorm's class but for its forward, so the class is all that changes, as in torch's
    lazy modules: parameters, buffers, names, hooks and modules that stand in two places stay the very same. The
    conversions of torch and timm make new modules, which lose hooks; a head may hang on one.

    Raises:
        UserError: no GPU, without which torch's does not train; a class with a forward of its own, which would be lost.
    """
    from timm.layers import BatchNormAct2d
    from timm.layers.norm_act import SyncBatchNormAct

    where = "loop.sync_batchnorm"
    if not world.cuda:
        raise UserError("SyncBatchNorm needs GPUs: torch has none for CPUs", where=where, todo="set it to false")
    synchronised = {_BatchNorm.forward: nn.SyncBatchNorm, BatchNormAct2d.forward: SyncBatchNormAct}
    norms: list[Any] = [m for m in net.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    own = sorted({type(norm).__name__ for norm in norms if type(norm).forward not in synchronised})
    if own:
        raise UserError(f"{', '.join(own)} cannot be synchronised: it computes in a way of its own", where=where)
    for norm in norms:
        norm.__class__ = synchronised[type(norm).forward]
        norm.process_group = None
