"""HEIC pictures, as phones take them: Pillow reads them where the package pillow-heif is installed (``tlx[heif]``)."""

from __future__ import annotations

from functools import cache

EXTENSIONS = ("heic", "heif", "hif")
FORMAT = "HEIF"
"""What Pillow calls them."""

_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"])
NEEDED = 'HEIC is read by a package that is not installed: pip install "tlx[heif]", or pillow-heif alone'


@cache
def register() -> bool:
    """Makes the format known to Pillow, once in a process; whether it is known."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_heif(data: bytes) -> bool:
    """Whether a file's bytes begin as HEIC (ISO/IEC 23008-12) does, and not as AVIF, which Pillow reads itself."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS and b"avif" not in data[8:64]
