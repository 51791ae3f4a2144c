"""What pyproject.toml cannot say: where the packages are, and the host extension."""

import hashlib
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, find_packages, setup

CSRC = Path("attngen/csrc")

# templates/ and variants/ stand at the top level of the repository and inside the package of a wheel.
PACKAGE_DIR = {"attngen": "attngen", "attngen.templates": "templates", "attngen.variants": "variants"}

# What attngen.load compares: a build that is older than its source is not loaded.
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(CSRC.iterdir()))).hexdigest()

host = Pybind11Extension(
    "attngen._host",
    [str(CSRC / "host.cpp")],
    depends=[str(path) for path in sorted(CSRC.iterdir())],
    cxx_std=17,
    extra_compile_args=["-O2"],
    define_macros=[("ATTNGEN_HOST_DIGEST", f'"{DIGEST}"')],
    # A machine without a compiler or Python's headers still installs; attngen.load says what is missing, when needed.
    optional=True,
)

# An editable install needs only the repository's root on sys.path: paths.py finds the two others. With them mapped,
# setuptools installs a finder, which a folder named attngen beside a script would win against.
EDITABLE = "editable_wheel" in sys.argv

setup(
    packages=find_packages(include=["attngen", "attngen.*"]) if EDITABLE else [
        *find_packages(include=["attngen", "attngen.*"]),
        "attngen.templates",
        *(f"attngen.templates.{name}" for name in find_namespace_packages("templates")),
        "attngen.variants",
        *(f"attngen.variants.{name}" for name in find_packages("variants")),
    ],
    package_dir={"": "."} if EDITABLE else PACKAGE_DIR,
    package_data={"attngen": ["py.typed", "csrc/*"]} | ({} if EDITABLE else {"attngen.templates": ["**/*"]}),
    ext_modules=[host],
    cmdclass={"build_ext": build_ext},
    zip_safe=False,
)
