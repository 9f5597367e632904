"""The part of the build that pyproject.toml cannot say: conf/ and sweeps/ are installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ehr_embed*"]), "ehr_embed.conf", "ehr_embed.sweeps"],
    package_dir={"ehr_embed.conf": "conf", "ehr_embed.sweeps": "sweeps"},
)
