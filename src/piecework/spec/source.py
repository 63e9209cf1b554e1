"""What a user writes for MODEL → the model's directory: one that is here, or the Hugging Face Hub's, from its cache.

The Hub is asked by huggingface_hub, with its own cache, tokens and settings (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`,
`HF_HUB_OFFLINE`). What is cached is not downloaded again; with a commit as the revision, the Hub isn't even asked.
Nothing that a bundle depends on says where a model came from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from piecework.errors import PieceworkError, UnsupportedModelError, WeightsError
from piecework.spec.conversions import to_safetensors

MODEL_HELP: Final = (
    "directory in Hugging Face layout, or OWNER/NAME[@REVISION] on the Hub (some, as gpt2, have no OWNER)"
)

_HUB_ID: Final = re.compile(r"(?P<repo>\w[\w.-]*(/[\w.-]+)?)(?:@(?P<revision>.+))?")
_FILES: Final = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".pwb")
"""How names end that are those of files, and of no repository."""
_DESCRIPTION: Final = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"),
    *("adapter_config.json", "model_index.json"),  # of what is no model on its own, so that it can be told
)
_WEIGHTS: Final = ("model*.safetensors", "model.safetensors.index.json", "[0-9]_*/model.safetensors")


@dataclass(frozen=True)
class HubId:
    """A repository of the Hub, "owner/name" or one of the first ones, "gpt2", and a branch, tag or commit of it.

    None is its main branch.
    """

    repo: str
    revision: str | None


def model_directory(model: str | Path) -> Path:
    """Return the directory of a model: `model` itself, or the cached one of a Hub id, fetched without weights.

    Raises UnsupportedModelError where the Hub has no such model, or it is neither cached nor to be reached.
    """
    hub = hub_id(model)
    if hub is None:
        return Path(model)
    directory = _fetch(hub, _DESCRIPTION)
    if not directory.is_dir():
        raise UnsupportedModelError(
            asked=f"the model {hub.repo}",
            found="a repository without config.json, as those of GGUF files are",
            try_="the repository of the model that it was made from, with safetensors",
        )
    return directory


def fetch_weights(model: str | Path, directory: Path) -> None:
    """Fetch a Hub id's safetensors into what `model_directory` returned for it; raises as that, and WeightsError."""
    hub = hub_id(model)
    if hub is None:
        return
    _fetch(replace(hub, revision=directory.name), _WEIGHTS)  # the commit: the Hub needn't be asked twice
    if not any(directory.glob("model*.safetensors")):
        raise WeightsError(
            asked=f"the weights of {hub.repo}",
            found="no model.safetensors, nor shards of one, in the repository",
            try_=f"where it has pytorch_model.bin: {to_safetensors(hub.repo, to='DIR')}, and copy the tokenizer to DIR",
        )


def model_name(model: str | Path) -> str:
    """Return what a model is called: its directory's name, or "owner/name"."""
    hub = hub_id(model)
    return Path(model).resolve().name if hub is None else hub.repo


def hub_id(model: str | Path) -> HubId | None:
    """Return the id that a text is, or None for the path of something that exists, or that can be no id."""
    found = _HUB_ID.fullmatch(str(model))
    if found is None or Path(model).exists() or ("/" not in found["repo"] and found["repo"].endswith(_FILES)):
        return None
    return HubId(found["repo"], found["revision"])


def _fetch(hub: HubId, patterns: tuple[str, ...]) -> Path:
    """Return the cached directory of a repository, with the files that the patterns name."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  a start from a directory does without: 0.2 s

    bar, wanted = _bar_on_terminals(), list(patterns)
    try:
        return Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=wanted, tqdm_class=bar))
    except Exception as error:  # its own errors, those of its HTTP library and of its downloader
        raise _as_ours(error, hub) from error


def _bar_on_terminals() -> type[Any]:
    """Return the library's progress bar, which is not shown where stderr is a file or a server's log."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"disable": None, **kwargs})

    return Bar


def _as_ours(error: Exception, hub: HubId) -> PieceworkError:
    """Say what failed at the Hub."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    first = str(error).strip().partition("\n")[0]
    page = f"{constants.ENDPOINT}/{hub.repo}"
    match error:
        case errors.GatedRepoError():
            found = f"a gated repository: {first}"
            try_ = f"accept its conditions on {page}, then `hf auth login`, or HF_TOKEN"
        case errors.RepositoryNotFoundError():
            found = f"neither a directory {hub.repo}, nor a repository of that name that may be read at {page}"
            try_ = "check the name; for a private repository, `hf auth login`, or HF_TOKEN"
        case errors.RevisionNotFoundError():
            found = f"no branch, tag or commit {hub.revision} in {page}"
            try_ = f"one that is listed at {page}/tree/main"
        case errors.HFValidationError():
            found, try_ = f"neither a directory, nor an id of the Hub: {first}", "a directory, or OWNER/NAME"
        case errors.LocalEntryNotFoundError():
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} can't be reached"
            found = f"no directory {hub.repo}, not all of it in the cache {constants.HF_HUB_CACHE}, and {why}"
            try_ = f"a network, or a directory that `hf download {hub.repo} --local-dir DIR` made elsewhere"
        case _:
            found, try_ = f"a download from {page} failed: {type(error).__name__}: {first}", "try again"
    return UnsupportedModelError(
        asked=f"the model {hub.repo}" + (f" at {hub.revision}" if hub.revision else ""), found=found, try_=try_
    )
