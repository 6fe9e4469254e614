"""The result on the hub: what that needs is looked at before the run, and a failed upload costs nothing but itself."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from llava_next.training.recipe.config import RunConfig
from llava_next.training.watch.launcher import say_last

KEY = "push_to_hub"
EXPOSED = f"{KEY}: {{}} is there already, and public; make it private, give another name, or say --push_public true"
MOST_SAID = 300  # characters of an error of the hub's


def check_push(config: RunConfig) -> list[str]:
    """Whether the result may go where `push_to_hub` says, as far as can be known now.

    Returns:
        what could not be looked at, one a line.

    Raises:
        ValueError: no token, one that the hub refuses or that may not write there, no network by choice, or a
            repository there that everybody can read without `push_public`.
    """
    if not config.push_to_hub:
        return []
    if is_offline_mode():
        raise ValueError(f"{KEY}: HF_HUB_OFFLINE forbids it; unset one of them")
    if not get_token():
        raise ValueError(f"{KEY}: no token to upload with; set HF_TOKEN to one that may write, or `hf auth login`")
    try:
        who, exposed = HfApi().whoami(), is_exposed(config)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise ValueError(
                f"{KEY}: the hub refuses the token (HTTP {status}); set HF_TOKEN to another one"
            ) from error
        return [f"{KEY}: the token could not be looked at (HTTP {status}); the upload may fail, the run will not"]
    except Exception as error:  # no network now: there may be one at the end
        said = " ".join(str(error).split())[:MOST_SAID] or type(error).__name__
        return [f"{KEY}: the hub cannot be reached now ({said}); the upload may fail, the run will not"]
    owner, own = config.push_to_hub.partition("/")[0], [who["name"], *(org["name"] for org in who.get("orgs", []))]
    if owner.lower() not in [name.lower() for name in own]:
        raise ValueError(
            f"{KEY}: {config.push_to_hub}: the token is {who['name']}'s, who may write to {', '.join(own)}"
        )
    if (who.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{KEY}: the token may only read; set HF_TOKEN to one that may write")
    if exposed:
        raise ValueError(EXPOSED.format(config.push_to_hub))
    return []


def is_exposed(config: RunConfig) -> bool:
    """Whether everybody can read a repository that is there already, and the result is not to be public."""
    if config.push_public:
        return False
    try:
        return not HfApi().repo_info(config.push_to_hub).private
    except RepositoryNotFoundError:
        return False


def push(config: RunConfig) -> int:
    """Uploads `model/` with its card, when that is asked for.

    Returns:
        the exit status of the run: 1 when it failed; the command that repeats it is then the run's last word.
    """
    if not config.push_to_hub:
        return 0
    repo, folder = config.push_to_hub, Path(config.run_dir) / "model"
    print(f"uploading {folder} to {repo}", flush=True)
    try:
        api = HfApi()
        api.create_repo(repo, private=not config.push_public, exist_ok=True)  # of one that is there it changes nothing
        if is_exposed(config):
            raise ValueError(EXPOSED.format(repo))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Result of a training run")
    except Exception as error:
        said = " ".join(str(error).split())[:MOST_SAID] or type(error).__name__
        visibility = "--no-private" if config.push_public else "--private"
        say_last(
            f"{KEY}: the run is done and {folder} is whole, but it could not be uploaded to {repo} "
            f"({said}). To repeat that:\n"
            f"{shlex.join(['hf', 'upload', repo, str(folder), '.', visibility])}",
            1,
        )
        return 1
    print(f"uploaded to {repo}, {'public' if config.push_public else 'private'}", flush=True)
    return 0
