"""What pyproject.toml cannot say: the experiments lie beside the package; in its wheel they are g2rpo/workspace."""
import shutil
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

WORKSPACE = ('nbs/*.ipynb', 'paper_figures/*', 'paper_figures/results/*', 'configs/*', 'scripts/*.sbatch')

class BuildWithWorkspace(build_py):
    "Modules as always, and the files that an experiment reads."
    def run(self):
        super().run()
        if self.editable_mode:     # a clone has them where they are
            return
        for file in [f for pattern in WORKSPACE for f in Path().glob(pattern) if f.is_file()]:
            target = Path(self.build_lib)/'g2rpo'/'workspace'/file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

setup(cmdclass=dict(build_py=BuildWithWorkspace))
