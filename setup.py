"""Package folders: numba_kernels/ and integrations/ install as ftops.numba_kernels and ftops.integrations."""
from setuptools import find_packages, setup

inner = find_packages(include=["numba_kernels", "numba_kernels.*", "integrations", "integrations.*"])
setup(
    packages=find_packages(include=["ftops", "ftops.*"]) + [f"ftops.{name}" for name in inner],
    package_dir={"ftops": "ftops", "ftops.numba_kernels": "numba_kernels", "ftops.integrations": "integrations"},
    include_package_data=False,
    package_data={"ftops.integrations.demo": ["model/*"]},
)
