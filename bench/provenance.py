"""What made a result: which code, on which machine?

A result is worth something as long as both are known: report.py keeps them in its records,
compare.py goes on only with what the same code has measured, and tables begin with the machine.
"""

import ast
import hashlib
import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


def digest_of_code(program: Path) -> str:
    """Of a program, and all files of ours that it needs: a commit of results, of text or of another
    program changes none of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files_needed(program)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def files_needed(program: Path) -> set[Path]:
    """The program, and what it imports or starts of ours, and that in turn."""
    needed = set()
    new = {program}
    while new:
        file = new.pop()
        needed.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [f"{alias.name}.py" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.py"]
            elif isinstance(node, ast.Constant):
                names = re.findall(r"^\w+\.py$", str(node.value))
            files = {folder / name for folder in (HERE, HERE.parent) for name in names}
            new |= {file for file in files if file.is_file()} - needed
    return needed


def machine() -> dict:
    return dict(
        cpus=os.cpu_count(),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
    )


def describe_machine(device: str = "cpu") -> str:
    """The same in words, for the head of a table; and the GPU, where that is what computes."""
    facts = machine()
    cores = f"{facts['cpus']} core{'s' * (facts['cpus'] != 1)}"
    if device == "cuda":
        cores = f"{torch.cuda.get_device_name()}, {cores}"
    python, torch_version = facts["python"], facts["torch"]
    return f"{cores}, {facts['platform']}, Python {python}, torch {torch_version}"


if __name__ == "__main__":
    print(__doc__)
