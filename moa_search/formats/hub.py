"""Plans in repositories of the Hugging Face hub: one repository, or folder, holds a model's plans for several budgets.

`huggingface_hub`'s `ModelHubMixin` isn't used: it keeps one object per repository, named ``config.json``, where several
plans lie side by side here, with the transforms of keys that they share.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError, HubError, MoAError
from moa_search.formats.card import write_card
from moa_search.formats.files import nearest, one_line
from moa_search.formats.plan import Plan
from moa_search.formats.transforms import KeyTransforms

SCHEME = "hf://"
"""Begins a plan's name wherever a plan file is asked for: ``hf://org/plans/quarter``."""

PLAN_START = re.compile(rb'\s*\{\s*"schema":\s*"moa-plan/')
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

OTHERS = ("config.json", "*_config.json", "tokenizer.json", "vocab.json", "*tokens*.json", "*.index.json", "*/*")
"""What a repository with a model besides its plans holds, and isn't looked into."""


def looks_like_repository(name: str) -> bool:
    """Whether a name that is no file's can be a repository's, such as ``org/plans``."""
    return REPOSITORY.fullmatch(name) is not None and Path(name).suffix not in (".json", ".safetensors", ".tsv")


def locate(path: str) -> str:
    """The local file of a plan that ``hf://org/plans/name`` names; any other path is itself.

    Raises:
        HubError: There is no such plan, or the hub can't be reached.
    """
    if not path.startswith(SCHEME):
        return path
    repo, name = _split(path)
    return str(find_plan(repo, name))


def find_plan(repo: str | os.PathLike[str], name: str | None = None, **options: Any) -> Path:
    """The local file of a plan, with its transforms of keys beside it.

    Args:
        repo: A repository such as ``org/plans``, or a folder.
        name: Of the plan; None where there is only one.
        **options: Of `huggingface_hub.hf_hub_download`, such as ``revision``, ``token`` and ``cache_dir``.

    Raises:
        ConfigError: The folder holds no such plan.
        HubError: The repository doesn't, or it can't be reached.
        PlanFormatError: A file is damaged.
    """
    if name is not None:
        name = _require_name(name)
    if Path(repo).is_dir():
        return Path(repo) / f"{_chosen(repo, plan_files(repo), name)}.json"
    repo = os.fspath(repo)
    if name is None:
        name = _chosen(repo, plan_files(fetch_folder(repo, **options)), None)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _told(repo):
        try:
            file = Path(hf_hub_download(repo, f"{name}.json", **options))
        except LocalEntryNotFoundError:  # nothing can be said about the repository
            raise
        except EntryNotFoundError:
            _chosen(repo, plan_files(fetch_folder(repo, **options)), name)
            raise
        transforms = _read(repo, file).transforms
        if transforms is not None:
            # Of the same commit: it must lie in the same folder.
            of_commit = {**options, "revision": file.parent.name}
            try:
                hf_hub_download(repo, KeyTransforms.file_name(transforms), **of_commit)
            except EntryNotFoundError:
                raise HubError(
                    f"{repo}: {name}.json needs {KeyTransforms.file_name(transforms)}, which isn't there; push it again"
                ) from None
    return file


def read_plans(repo: str | os.PathLike[str], **options: Any) -> dict[str, Plan]:
    """The plans of a repository or folder by name, without their transforms of keys.

    Args:
        repo: As for `find_plan`.
        **options: As for `find_plan`.

    Raises:
        ConfigError: It is neither, or holds no plan.
        HubError: The repository can't be reached.
        PlanFormatError: A plan is damaged.
    """
    folder = Path(repo)
    if not folder.is_dir():
        folder = fetch_folder(os.fspath(repo).removeprefix(SCHEME), **options)
    files = plan_files(folder)
    if not files:
        raise ConfigError(f"{repo}: holds no plans")
    return {name: _read(repo, file) for name, file in files.items()}


def plan_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The plans of ours in a folder, by name; none in folders within it."""
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        with file.open("rb") as opened:
            if PLAN_START.match(opened.read(256)):
                found[file.stem] = file
    return found


def fetch_folder(repo: str, **options: Any) -> Path:
    """A local folder with all plans of a repository, and its card, but without transforms of keys.

    Raises:
        HubError: There is no such repository, or it can't be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import REPOCARD_NAME

    with _told(repo):
        return Path(
            snapshot_download(repo, allow_patterns=["*.json", REPOCARD_NAME], ignore_patterns=list(OTHERS), **options)
        )


def push_plans(
    plans: Mapping[str, Plan],
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put plans into a repository, in one commit: their files, transforms of keys, and a card that lists all there are.

    What the card says outside of what this wrote stays.

    Args:
        plans: By name, all for one model.
        repo: Such as ``org/plans``; made if it isn't there.
        base_model: Hub id of the model that they are for, for the card.
        license: Such as ``apache-2.0``, for the card.
        private: Whether a repository that is made is private; otherwise it is what its owner has made the default.
        token: By default the one that you are logged in with.
        revision: Branch; by default the main one.
        message: Of the commit.
        create_pr: Whether to open a pull request instead.

    Returns:
        The commit's address.

    Raises:
        ConfigError: No plans, or a name can't be a file's.
        ModelMismatchError: Plans are for different models, those in the repository included.
        PlanFormatError: A plan came without its transforms, or one in the repository is damaged.
        HubError: The repository can't be written.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.constants import REPOCARD_NAME

    plans = {_require_name(name): plan for name, plan in plans.items()}
    if not plans:
        raise ConfigError("no plans to push")
    if not looks_like_repository(repo):
        raise ConfigError(f"{repo!r} is no repository of the hub; give one such as org/plans")
    first = next(iter(plans))
    for name, plan in plans.items():
        plan.model.require(plans[first].model, f"plan {name} (beside {first})")
    files = {f"{name}.json": plan.dumps().encode() for name, plan in plans.items()}
    for plan in plans.values():
        if plan.key_transforms is not None:
            files[KeyTransforms.file_name(plan.key_transforms.checksum)] = plan.key_transforms.to_bytes()
    api = HfApi(token=token)
    with _told(repo, "written"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        old, there = None, {}
        if any(
            name.endswith(".json") or name == REPOCARD_NAME for name in api.list_repo_files(repo, revision=revision)
        ):
            folder = fetch_folder(repo, revision=revision, token=token)
            there = {name: _read(repo, file) for name, file in plan_files(folder).items()}
            if (folder / REPOCARD_NAME).is_file():
                old = (folder / REPOCARD_NAME).read_text(encoding="utf-8")
        for name in there.keys() - plans.keys():
            plans[first].model.require(there[name].model, f"plan {first} (beside {name} in {repo})")
        card = write_card(
            dict(sorted({**there, **plans}.items())),
            repo,
            base_model=base_model,
            license=license,
            old=old,
        )
        files[REPOCARD_NAME] = card.encode()
        done = api.create_commit(
            repo,
            [CommitOperationAdd(file, content) for file, content in files.items()],
            commit_message=message or f"Plans: {', '.join(plans)}",
            revision=revision,
            create_pr=create_pr,
        )
    return str(done.pr_url or done.commit_url)


def _read(repo: str | os.PathLike[str], file: Path) -> Plan:
    """A plan without its transforms of keys."""
    return Plan.loads(file.read_bytes(), source=f"{repo}: {file.name}")


def _split(path: str) -> tuple[str, str | None]:
    """Repository and plan of ``hf://org/plans/name``."""
    parts = path.removeprefix(SCHEME).split("/")
    if len(parts) not in (2, 3) or not looks_like_repository("/".join(parts[:2])):
        raise ConfigError(f"{path}: expected {SCHEME}ORG/REPOSITORY/PLAN")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _require_name(name: str) -> str:
    plain = name.removesuffix(".json")
    if NAME.fullmatch(plain) is None or f"{plain}.json" in OTHERS or plain.endswith("_config"):
        raise ConfigError(
            f"plan name {one_line(name)!r}: letters, digits, '.', '_' and '-', and no name of a model's file"
        )
    return plain


def _chosen(repo: str | os.PathLike[str], files: Mapping[str, Path], name: str | None) -> str:
    """The plan asked for among those there are."""
    if name is not None and name in files:
        return name
    if name is None and len(files) == 1:
        return next(iter(files))
    if not files:
        raise ConfigError(f"{repo}: holds no plans")
    if name is None:
        raise ConfigError(f"{repo}: holds several plans; give one of {', '.join(files)}")
    raise ConfigError(f"{repo}: holds no plan {name!r}{nearest(name, files)}; there are {', '.join(files)}")


@contextlib.contextmanager
def _told(repo: str, doing: str = "read") -> Iterator[None]:
    """Tell what huggingface_hub and its HTTP library raise in one line."""
    try:
        yield
    except MoAError:
        raise
    except Exception as error:
        # What keeps a forced download from starting, or a large file from being sent, is told by the cause.
        wrapped = type(error) in (ValueError, RuntimeError) and error.__cause__ is not None
        reason = _reason(error.__cause__ if wrapped and error.__cause__ is not None else error)
        if reason is None:
            raise
        raise HubError(f"{repo} can't be {doing}: {reason}") from None


def _reason(error: BaseException) -> str | None:
    """Why the hub gave nothing, and what to do; None where something else is wrong."""
    from huggingface_hub import errors

    known: dict[tuple[type[BaseException], ...], str] = {
        (errors.GatedRepoError,): "it is gated; ask for access on its page, and log in: hf auth login",
        (errors.RepositoryNotFoundError,): (
            "neither a folder here nor a repository that you may read; for a private one, log in: hf auth login"
        ),
        (errors.RevisionNotFoundError,): "it has no such revision",
        (errors.HFValidationError,): "neither a folder here nor the name of a repository, such as org/plans",
        (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError): (
            "the hub can't be reached and it isn't in the cache here; connect, unset HF_HUB_OFFLINE, or give a folder"
        ),
    }
    for kinds, reason in known.items():
        if isinstance(error, kinds):
            return reason
    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            return "the hub refuses; log in with a token that may write there: hf auth login"
        return f"the hub answers {code}: {one_line(error.server_message or error)}"
    unreached = isinstance(error, ConnectionError | TimeoutError)  # hf_xet's, which sends and reads large files
    if unreached or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "huggingface_hub"):
        return f"the hub can't be reached ({one_line(error)})"
    return None
