"""The optional C extension (`_jpeg.c`): JPEG bytes to a small picture, decoding only the region that is needed.

It is missing where tlx was installed without a C compiler or without libjpeg-turbo's header; importing it then raises
ImportError.
"""

from typing import final

from typing_extensions import Buffer

__all__ = ["INTERFACE", "Decoder", "about", "rewrite"]

INTERFACE: int
"""Of the source that this was built from; see `tlx.data.pixels.extension`."""

def about() -> str:
    """The library and the arithmetic in use, such as "libjpeg-turbo 2.1.5, AVX2" or "libjpeg-turbo 2.1.5, plain C"."""

@final
class Decoder:
    """A JPEG decoder that keeps its buffers from picture to picture: one for each thread.

    It releases the GIL while it decodes. A call while another thread is inside one raises RuntimeError.
    """

    def __init__(self) -> None: ...
    def open(self, data: Buffer) -> tuple[int, int, int]:
        """Read the header: width, height, components.

        Components are 1 (grey), 3 (colour) or 4 (CMYK, YCCK). `data` is held until `view`, `close` or the next `open`.

        Raises:
            ValueError: with the reason: no JPEG, a damaged header, a kind that is not supported (arithmetic coding,
                12 bits, lossless), or "it ends too early" where there is no end marker after the scan's first byte.
        """

    def view(
        self,
        out: Buffer,
        crop: tuple[int, int, int, int],
        resized: tuple[int, int],
        window: tuple[int, int, int, int],
        *,
        bicubic: bool = False,
        mirror: bool = False,
        flip: bool = False,
        least: float = 0.0,
    ) -> int:
        """Decode the picture that `open` has read, crop, resize and cut it, write it to `out`. Once for each `open`.

        Args:
            out: uint8 [height, width, C] of the window, C-contiguous and writable. C, 3 (RGB) or 1 (luma), follows from
                its length.
            crop: left, top, width, height in pixels of the picture as it is stored, before EXIF's orientation.
            resized: width and height that the crop is resized to, with an antialiased triangle filter as Pillow's
                BILINEAR, or Pillow's BICUBIC. The filter does not look outside the crop.
            window: left, top, width, height of the part of the resized crop that is written.
            bicubic: Pillow's BICUBIC (a = -0.5) in place of the triangle.
            mirror: the window's columns in reverse order.
            flip: the window's rows in reverse order.
            least: 0 for a full decode. Otherwise the picture may be decoded at 1/2, 1/4 or 1/8 of its size (DCT
                scaling) as long as the crop keeps `least` times the size of `resized`, in both directions.

        Returns:
            The denominator of the DCT scaling: 1, 2, 4 or 8.

        Raises:
            ValueError: with the reason: nothing opened, an impossible geometry, four components, damaged data in the
                region, also what libjpeg could have repaired; data that runs out is "it ends too early".
        """

    def close(self) -> None:
        """Let go of the data."""

def rewrite(data: Buffer, *, restarts: bool = True) -> bytes:
    """The same picture, coefficient for coefficient, as a sequential JPEG with optimised Huffman tables.

    What `jpegtran -copy all -optimize -restart 1` does: APPn and COM markers are kept.

    Args:
        restarts: a restart marker at the end of every row of MCUs, so that `Decoder.view` can begin at any of them.

    Raises:
        ValueError: with the reason, for anything damaged, also what libjpeg could have repaired.
    """
