"""Names of the Hugging Face Hub: which commit a name means, and what to do when it cannot be had.

Owns: reading `org/name@revision`, the commit that a name was first found at (pinned in the cache, so that a run does
not change when the hub does, and every rank and every restart means the same), and errors a person can act on.

Does not own: downloading, which the libraries do, into Hugging Face's own cache. Tokens are theirs too: none is read,
passed or printed here, and no code that comes with a repository is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from train.data import DataError, cache

Kind = Literal["dataset", "model"]

_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECRET = re.compile(r"hf_\w+|(?<=earer )\S+")
_TIMEOUT_S = 20.0
_UNREACHED = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TransportError", "Timeout"}


def parse(text: str) -> tuple[str, str | None] | None:
    """(id, revision or None) of a text that reads like a hub id, else None."""
    match = _ID.fullmatch(text)
    return (match["name"], match["revision"]) if match else None


def commit(kind: Kind, name: str, revision: str | None, root: Path, say: Callable[[str], None] = print) -> str:
    """The commit that `name` means: the full sha given, the one pinned in the cache `root`, or the newest, then pinned.

    Raises DataError when the hub does not have it, does not give it to us, or is not reached.
    """
    revision = revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    pin = root / "hub" / f"{kind}--{name.replace('/', '--')}--{revision.replace('/', '--')}.json"
    with suppress(OSError, ValueError):
        return json.loads(pin.read_text())["commit"]
    try:
        from huggingface_hub import HfApi

        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S).sha
    except Exception as error:
        found = _downloaded(kind, name, revision)
        if found is None:
            raise explain(error, kind, name, revision) from None
    say(f"{name}: {revision} is commit {found} from now on; for another, name it: {name}@COMMIT")
    with suppress(OSError):
        cache.write(pin, json.dumps({"commit": found}))
    return str(found)


def explain(error: BaseException, kind: Kind, name: str, revision: str | None = None) -> DataError:
    """The same error in words that say what to do."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {base.__name__ for link in chain for base in type(link).__mro__}
    words = " ".join(str(link) for link in chain).lower()
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = "log in with `hf auth login` (or set HF_TOKEN to a token that may read it)"
    if "GatedRepoError" in kinds or re.search("(is|access) a gated", words):
        return DataError(f"The {kind} {name} is gated: accept its licence at {page}, then {login}, and try again.")
    if "RevisionNotFoundError" in kinds:
        return DataError(f"The {kind} {name} has no revision {revision!r}. See {page}/commits/main for what it has.")
    if kinds & {
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectError",
        "Timeout",
        "TimeoutException",
        "TransportError",
    }:
        offline = "OfflineModeIsEnabled" in kinds
        return DataError(
            f"The {kind} {name} is not on this machine, and the hub "
            + ("was not asked, as HF_HUB_OFFLINE is set. " if offline else "was not reached. ")
            + f"If {name} should be a path: there is no such file or directory. Otherwise prepare once where there is "
            f"a network (`gearshift prepare`, same data.cache_dir), or copy it here and give the path."
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return DataError(
            f"{name} is neither a file or directory here nor a {kind} on the hub that you may see. Check the spelling "
            f"({page}); if it is private, {login}."
        )
    if "scripts are no longer supported" in words or "trust_remote_code" in words:
        return DataError(
            f"The {kind} {name} needs code of its own to be read, and code that comes with data is never run here. "
            f"Use a copy in Parquet or JSON lines, or the hub's own conversion: {name}@refs/convert/parquet."
        )
    said = _SECRET.sub("***", str(error).strip().splitlines()[0] if str(error).strip() else "")
    return DataError(f"The {kind} {name} cannot be loaded: {type(error).__name__}: {said}")


def _downloaded(kind: Kind, name: str, revision: str) -> str | None:
    """The commit that another program left in Hugging Face's cache under this revision."""
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / revision
    try:
        return reference.read_text().strip()
    except OSError:
        return None
