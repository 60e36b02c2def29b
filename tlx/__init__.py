"""tlx: transfer learning for images at cluster scale. data -> plan -> loop."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tlx")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"
