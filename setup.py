"""The optional C extension; everything else about the package is in pyproject.toml."""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TODO = "install a C compiler and libjpeg-turbo's header (libjpeg-dev or libjpeg-turbo-devel), then install tlx again"


class BuildOrGoOn(build_ext):
    """tlx also works without the extension, slower: what cannot be built is announced, not an error."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # setuptools raises what its compiler classes raise
            print(
                f"warning: {ext.name} was not built, tlx will decode with torchvision (slower): {error}",
                file=sys.stderr,
            )
            print(f"warning: to mend it: {TODO}", file=sys.stderr)
            raise  # optional=True: setuptools goes on, and copies nothing


setup(
    cmdclass={"build_ext": BuildOrGoOn},
    ext_modules=[
        Extension(
            "tlx.data._jpeg",
            ["tlx/data/_jpeg.c"],
            libraries=["jpeg"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ],
)
