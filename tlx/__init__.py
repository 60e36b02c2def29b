"""tlx: transfer learning for images at cluster scale. data -> plan -> loop."""

__version__ = "0.2.0"  # pyproject.toml takes it from here: a checkout and what is installed cannot disagree
