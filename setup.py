"""The part of the build that pyproject.toml cannot say: conf/ and sweeps/ are installed inside the package."""

from setuptools import find_namespace_packages, setup

# Folders of YAML, tables and templates count as packages, and setuptools warns of each that is not named.
OPTIONS = find_namespace_packages(include=["conf", "conf.*", "sweeps", "sweeps.*"], exclude=["*.__pycache__"])

setup(
    packages=[
        *find_namespace_packages(include=["ehr_embed", "ehr_embed.*"], exclude=["*.__pycache__"]),
        *(f"ehr_embed.{name}" for name in OPTIONS),
    ],
    package_dir={"ehr_embed.conf": "conf", "ehr_embed.sweeps": "sweeps"},
)
