"""How many samples may be unreadable."""

from __future__ import annotations

from tlx.base.errors import UserError
from tlx.train.run import Run


def count_bad(run: Run) -> None:
    """Every rank learns the names of unreadable samples.

    Raises:
        UserError: there are more than the configuration allows.
    """
    run.progress.bad = {where: why for part in run.world.gather(run.progress.bad) for where, why in part.items()}
    quota = run.config.data.quota(run.stream.distinct_samples)
    if len(run.progress.bad) > quota:
        names = [f"{where}: {why}" for where, why in sorted(run.progress.bad.items())]
        raise UserError(
            f"{len(names)} unreadable samples, {quota} allowed:\n    " + "\n    ".join(names[:10]),
            where="data.bad_samples",
            todo="`tlx shards check` names all of them; mend the shards, or allow some: data.bad_samples=1%",
        )
