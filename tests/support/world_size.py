"""Joins the world as `tlx train` does, and says how large it is."""

import sys

from tlx.base.errors import UserError
from tlx.plan.config import parse
from tlx.ranks.rendezvous import join_ranks

data, backbone = {"train": "x", "batch": 1}, {"name": "toys:small"}
config = parse({"run": "x", "data": data, "backbone": backbone, "world": {"device": "cpu"}})
try:
    joined = join_ranks(config)
except UserError as error:
    sys.exit(f"error: {error}")
print(f"rank {joined.rank} of {joined.size}", flush=True)
joined.barrier()
joined.close()
