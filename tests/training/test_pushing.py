"""The result on the hub: refused before the run where it cannot work, and a failed upload costs the run nothing."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from llava_next.training import pushing
from llava_next.training.pushing import check_push, push
from llava_next.training.recipe.config import RunConfig, parse_run

RIGHTS = {"name": "me", "orgs": [{"name": "Lab"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """What the hub answers, and what it was asked for."""

    def __init__(self, answer=RIGHTS, there: bool | None = None):
        """`there`: whether a repository that is there already is private; None: there is none."""
        self.answer, self.there, self.asked = answer, there, []

    def __call__(self):
        return self

    def whoami(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def repo_info(self, repo):
        if self.there is None:
            raise refusal(404, RepositoryNotFoundError)
        return SimpleNamespace(private=self.there)

    def create_repo(self, repo, **options):
        self.asked.append((repo, options))
        self.there = options["private"] if self.there is None else self.there

    def upload_folder(self, **options):
        self.whoami()
        self.asked.append(options)


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "is_offline_mode", lambda: False)
    monkeypatch.setattr(pushing, "get_token", lambda: "hf_secret")
    return RunConfig(run_dir=str(tmp_path), push_to_hub="lab/model")


@pytest.mark.parametrize(
    ("patches", "answer", "message"),
    [
        ({"is_offline_mode": lambda: True}, RIGHTS, "HF_HUB_OFFLINE forbids it"),
        ({"get_token": lambda: None}, RIGHTS, "no token to upload with; set HF_TOKEN"),
        ({}, refusal(401), r"refuses the token \(HTTP 401\)"),
        ({}, {**RIGHTS, "orgs": []}, "the token is me's, who may write to me"),
        ({}, {**RIGHTS, "auth": {"accessToken": {"role": "read"}}}, "may only read"),
    ],
    ids=["offline", "no token", "a wrong one", "another owner's place", "a token to read with"],
)
def test_push_that_cannot_work_is_refused_before_the_run(config, monkeypatch, patches, answer, message):
    for name, value in {**patches, "HfApi": Hub(answer)}.items():
        monkeypatch.setattr(pushing, name, value)
    with pytest.raises(ValueError, match=f"^push_to_hub: .*{message}"):
        check_push(config)


@pytest.mark.parametrize("answer", [refusal(503), ConnectionError("no route")], ids=["hub is down", "no network"])
def test_hub_that_cannot_be_asked_now_is_told_and_not_refused(config, monkeypatch, answer):
    monkeypatch.setattr(pushing, "HfApi", Hub(answer))
    assert "the upload may fail, the run will not" in check_push(config)[0]
    monkeypatch.setattr(pushing, "HfApi", Hub())
    assert check_push(config) == [] == check_push(RunConfig())


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/na me", "-org/--"])
def test_name_that_is_none_is_refused_with_the_command_line(name, tmp_path):
    given = ["--model", "m", "--run_dir", str(tmp_path), "--data.sources", "d", f"--push_to_hub={name}"]
    with pytest.raises(ValueError, match=r"push_to_hub: .* is no repository's name; give ORG/NAME"):
        parse_run(given)


def test_result_goes_up_private_unless_said_otherwise(config, monkeypatch, tmp_path):
    for public in (False, True):
        hub = Hub()
        monkeypatch.setattr(pushing, "HfApi", hub)
        config.push_public = public
        assert push(config) == 0 and push(RunConfig()) == 0 and len(hub.asked) == 2
        assert hub.asked[0] == ("lab/model", {"private": not public, "exist_ok": True})
        assert hub.asked[1]["folder_path"] == tmp_path / "model" and hub.asked[1]["repo_id"] == "lab/model"


def test_private_result_never_goes_into_a_repository_that_is_public_already(config, monkeypatch, capsys):
    hub = Hub(there=False)
    monkeypatch.setattr(pushing, "HfApi", hub)
    with pytest.raises(ValueError, match=r"^push_to_hub: lab/model is there already, and public"):
        check_push(config)
    assert push(config) == 1 and len(hub.asked) == 1  # made public while the run went on: nothing is uploaded
    assert "is whole, but it could not be uploaded" in capsys.readouterr().err
    config.push_public = True
    assert check_push(config) == [] and push(config) == 0
    monkeypatch.setattr(pushing, "HfApi", Hub(there=True))
    config.push_public = False
    assert check_push(config) == [] and push(config) == 0


def test_failed_upload_ends_with_the_command_that_repeats_it(config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pushing, "HfApi", Hub(ConnectionError("the line is dead")))
    assert push(config) == 1
    told = capsys.readouterr().err
    assert f"the run is done and {tmp_path}/model is whole" in told and "(the line is dead)" in told
    assert told.splitlines()[-1] == f"hf upload lab/model {tmp_path}/model . --private"
