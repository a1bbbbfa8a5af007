"""Adds one step to the build: the Python code of `proto/phaul/v1` is generated before it is packed."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class GenerateThenBuild(build_py):
    """`build_py` that runs scripts/generate first."""

    def run(self) -> None:
        # An editable install reads the checkout, where scripts/setup has generated the code already.
        if not self.editable_mode:
            subprocess.run([ROOT / "scripts" / "generate"], check=True, env={**os.environ, "PYTHON": sys.executable})
        super().run()


setup(cmdclass={"build_py": GenerateThenBuild})
