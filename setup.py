"""The optional compiled core; everything declarative is in setup.cfg."""

from setuptools import Extension, setup

# Without a compiler the package is built and complete all the same: `optional` makes a warning of the failure.
setup(
    ext_modules=[
        Extension(
            "broker.wire._native",
            ["broker/wire/_native.c", "broker/wire/_native_matcher.c"],
            depends=["broker/wire/_native.h"],
            optional=True,
        )
    ]
)
