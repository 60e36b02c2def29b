"""What may go wrong a little: unreadable samples, gradients that are not finite."""

from __future__ import annotations

from tlx.errors import TlxError, UserError
from tlx.run import Run


def count_bad(run: Run) -> None:
    """Every rank learns the names of unreadable samples.

    Raises:
        UserError: there are more than the configuration allows.
    """
    run.progress.bad = {where: why for part in run.world.gather(run.progress.bad) for where, why in part.items()}
    quota = run.config.data.quota(len(run.stream.manifest))
    if len(run.progress.bad) > quota:
        names = [f"{where}: {why}" for where, why in sorted(run.progress.bad.items())]
        raise UserError(
            f"{len(names)} unreadable samples, {quota} allowed:\n    " + "\n    ".join(names[:10]),
            where="data.bad_samples",
            todo="`tlx shards check` names all of them; mend the shards, or allow some: data.bad_samples=1%",
        )


def refuse_unfinite(run: Run, step: int) -> None:
    """fp16 overflows now and then, and its scaler mends it; anything else is a fault.

    Raises:
        TlxError: the gradient is not finite, or stays so.
    """
    allowed = 20 if run.world.scaler is not None else 0
    if run.progress.unfinite_in_a_row > allowed:
        raise TlxError(
            f"the gradient is not finite at step {step} of phase "
            f"{run.plan.phase(step - 1).name}; nothing was updated, the last checkpoint is from step "
            f"{max(run.saved, 0)}. Lower the learning rate, warm up, or set loop.clip"
        )
