"""What is known of a shard that came from elsewhere: what its server called that version, and its hash.

It is written beside the shard, in ``.NAME.json``, and stays when the shard leaves the cache: by it another version is
told from the one that was used before. Where the index has the shard's hash, that decides, and this is only a note.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tlx.base.files import write_whole
from tlx.base.parsing import from_json


@dataclass(frozen=True)
class Kept:
    """One version.

    Attributes:
        version: what the other side called it (see `tlx.data.remote.files.Arrived`); empty where it did not say.
        sha256: of its bytes; empty where that is not known.
        checked: when the other side was last asked whether it is still that one, in seconds since the epoch.
        replaced: the hash of other bytes that were kept here before; empty where there were none.
        replaced_checked: when the other side was last asked about these.
    """

    version: str
    sha256: str
    checked: float
    replaced: str = ""
    replaced_checked: float = 0.0

    def after(self, former: Kept | None) -> Kept:
        """This one, with a note of what it takes the place of."""
        if former is None or not former.sha256:
            return self
        if former.sha256 == self.sha256:  # the same bytes, under another name
            return replace(self, replaced=former.replaced, replaced_checked=former.replaced_checked)
        return replace(self, replaced=former.sha256, replaced_checked=former.checked)

    def write(self, shard: Path) -> None:
        """Beside the shard."""
        write_whole(_beside(shard), json.dumps(asdict(self)))


def read_kept(shard: Path) -> Kept | None:
    """What is known of a shard; None where nothing is, or it cannot be read."""
    try:
        said = from_json(_beside(shard).read_bytes())
        kept = Kept(**said)
        texts, times = (kept.version, kept.sha256, kept.replaced), (kept.checked, kept.replaced_checked)
    except (OSError, ValueError, TypeError):
        return None
    sound = all(isinstance(t, str) for t in texts) and all(isinstance(t, int | float) for t in times)
    return kept if sound else None


def _beside(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.json")
