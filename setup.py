"""Which packages a wheel holds; everything else of the project's metadata is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

CODE = ("tidar_common", "data_prep", "pipeline")
CONF = ["", *(f".{name}" for name in find_namespace_packages("conf"))]

setup(
    packages=[
        *find_packages(include=[pattern for name in CODE for pattern in (name, f"{name}.*")]),
        *(f"pipeline.conf{name}" for name in CONF),
    ],
    # A checkout keeps its configuration at the top, a wheel carries it inside the package.
    package_dir={"pipeline.conf": "conf"},
)
