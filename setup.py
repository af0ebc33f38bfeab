"""Map the top-level folders into the `qatapult` package.

`kernels`, `trainer` and `launch` are too general to be importable on their own, so they are only ever
installed below `qatapult` (docs/architecture.md, Packaging).
"""

from setuptools import find_packages, setup

ROOMS = ("kernels", "trainer", "launch", "configs")

packages = [
    f"qatapult.{package}"
    for room in ROOMS
    for package in (room, *(f"{room}.{inner}" for inner in find_packages(room)))
]

setup(packages=packages, package_dir={f"qatapult.{room}": room for room in ROOMS})
