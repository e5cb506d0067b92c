"""What every test runs under: one thread per process, no network, nothing of this user's own, data prepared once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAUNCHERS = ("ACCELERATE_", "FSDP_", "PET_", "TORCHELASTIC_", "GEARSHIFT_", "SLURM_", "SBATCH_")
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module, and so torch, is imported; child processes inherit it."""
    for name in [n for n in os.environ if n.startswith(LAUNCHERS) or n in RANK]:
        del os.environ[name]
    # DeepSpeed's compiled operations outlive a session, where they always are: a minute of compiling each.
    former = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(former / "torch_extensions"))
    os.environ |= {
        "OMP_NUM_THREADS": "1",  # ranks with two threads each on two cores are not twice but ten times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "XDG_CACHE_HOME": str(_cache(config)),  # prepared data; Hugging Face's and Accelerate's files too
    }
    os.environ.pop("HF_HOME", None)


def _cache(config: pytest.Config) -> Path:
    """Kept between sessions (`pytest --cache-clear` empties it), and new whenever the code that fills it changes."""
    code = hashlib.sha256()
    for file in sorted((ROOT / "train" / "data").glob("*.py")):
        code.update(file.read_bytes())
    assert config.cache is not None
    return Path(config.cache.mkdir(f"prepared-{code.hexdigest()[:12]}"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `tests/trained.py`, made once for all files that use a trained model."""
    from tests import trained

    return trained.make(tmp_path_factory.mktemp("trained"))
