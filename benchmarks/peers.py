"""The peers: where their code comes from and what their environments hold. Nothing of them is part of this project:
whoever measures fetches them, into a folder that git ignores.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A library to compare with: its public repository and the commit that was measured, or, where there is no address,
    the version that is published as a package; and what it needs."""

    name: str
    address: str | None
    commit: str
    packages: tuple[str, ...]
    is_package: bool = True
    """False for a checkout that is run where it lies."""


PEERS = {
    "gfnx": Peer(
        "gfnx",
        "https://github.com/d-tiapkin/gfnx",
        "068316d394d432fed7a4d349b1a106b64c3c5771",
        (
            "jax==0.10.2", "jaxlib==0.10.2", "equinox==0.13.8", "optax==0.2.8", "flashbax==0.1.3", "chex==0.1.92",
            "hydra-core==1.3.8", "jax-tqdm==0.4.0", "jaxtyping==0.3.11", "networkx", "matplotlib", "hatchling",
        ),
    ),
    "torchgfn": Peer(
        "torchgfn",
        "https://github.com/GFNOrg/torchgfn",
        "f39bfc96407c0dcf443a41e5abb97503d707ea94",
        (
            "torch==2.13.0", "numpy==1.26.4", "tensordict==0.15.3", "torch_geometric==2.8.1", "einops", "dill",
            "linear-attention-transformer", "poetry-core", "matplotlib", "scipy",
        ),
    ),
    "phylogfn": Peer(
        "phylogfn",
        "https://github.com/zmy1116/phylogfn",
        "6a46f8682ff479961d66a367fec5ee9e798fc335",
        (
            "torch==2.13.0", "numpy==1.26.4", "ete3==3.1.3", "six", "dill", "docopt", "fvcore", "iopath", "matplotlib",
            "scipy", "tqdm",
        ),
        is_package=False,
    ),
    "trl": Peer("trl", None, "1.16.0", ("torch==2.13.0", "trl==1.16.0", "transformers==5.24.0")),
}  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """A peer that is ready to run: the Python that has it, and its checkout (its environment, for a published one)."""

    python: Path
    checkout: Path
    commit: str


def install(name: str, folder: Path, checkout: Path | None = None) -> Installed:
    """Clone `name` (unless a checkout is given, or it is a published package) and build its virtual environment, both
    in `folder`; what is there already is kept. Raises CalledProcessError if git or pip fails.
    """
    peer = PEERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if peer.address is None:
        home = folder / f"venv-{name}"
        return Installed(_environment(peer, home), home.resolve(), peer.commit)
    if checkout is None:
        checkout = folder / name
        if not checkout.exists():
            subprocess.run(["git", "clone", "--quiet", peer.address, str(checkout)], check=True)
            subprocess.run(["git", "-C", str(checkout), "checkout", "--quiet", peer.commit], check=True)
    python = _environment(peer, folder / f"venv-{name}", checkout)
    return Installed(python, checkout.resolve(), _commit(checkout))


def _environment(peer: Peer, home: Path, checkout: Path | None = None) -> Path:
    """The Python of the peer's virtual environment in `home`, made if there is none."""
    python = home / "bin" / "python"
    if not python.exists():
        print(f"building an environment for {peer.name} in {home}", file=sys.stderr)
        venv.create(home, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *peer.packages], check=True)
        if peer.is_package and checkout is not None:
            subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(checkout)], check=True)
    return python


def _commit(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
