"""What `tlx soup` tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tlx.base.location import shown
from tlx.base.terminal import escaped


def table(found: Mapping[str, Any]) -> str:
    return "\n".join(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    on, metric, all_of_them = found["chosen_on"], found["metric"], found["ingredients"]
    yield f"{on['samples']:,} pictures: {escaped(shown(on['data']))}"
    yield ""
    greedy = found["method"] == "greedy"
    yield f"{'':<34}{metric:>12}" + (f"{'averaged':>12}   taken" if greedy else "")
    for one in all_of_them:
        name = escaped(one["name"])
        row = f"  {name if len(name) <= 32 else '...' + name[-29:]:<32}{one['value']:>12.4f}"
        together = "-" if one["together"] is None else f"{one['together']:.4f}"
        yield row + (f"{together:>12}   {'yes' if one['taken'] else 'no'}" if greedy else "")
    alphas = found.get("alphas", ())
    for one in sorted(alphas, key=lambda one: one["alpha"]):
        chosen = "   chosen" if one is alphas[0] and len(alphas) > 1 else ""
        yield f"  alpha {one['alpha']:<26g}{one['value']:>12.4f}{chosen}"
    taken, result = sum(one["taken"] for one in all_of_them), found["soup"]
    yield f"{found['method']}, {taken} of {len(all_of_them)}".ljust(34) + f"{result['value']:>12.4f}"
    if result.get("resamples"):
        between = f"{result['low']:.4f} to {result['high']:.4f}"
        yield f"{'':<34}{between:>12}, 95 % of {result['resamples']:,} resamples"
    yield ""
    statistics = found["statistics"]
    if statistics["norms"]:
        how = f"estimated on {statistics['pictures']:,} training pictures" if statistics["pictures"] else "averaged"
        yield f"{statistics['norms']} norms had other running statistics in each: {how}"
    yield "chosen on these pictures; tlx evaluate with --data TEST tells how good it is"
    yield f"weights: {escaped(found['weights']['file'])}"
