"""Adds the configs, which lie beside the packages, to the wheel as `tapfm/configs`.

Everything else is in setup.cfg.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tapfm*", "slides*"]), "tapfm.configs"],
    package_dir={"tapfm.configs": "configs"},
)
