"""How long a failed request to a hub is waited on, and what of the lock is told."""

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from stages.corpus.hub import LONGEST_WAIT, WAITS, pause
from stages.corpus.sources_lock import PinnedDataset, PinnedModel
from stages.host.hub_sources import in_words

NETWORK = [httpx.ConnectError("refused"), httpx.ReadTimeout("late"), httpx.RemoteProtocolError("broke off")]


def answer(status: int, **headers: str) -> HfHubHTTPError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HfHubHTTPError("", response=httpx.Response(status, headers=named, request=httpx.Request("GET", "http://hub")))


@pytest.mark.parametrize("error", [*NETWORK, answer(500), answer(503), answer(429)])
def test_each_wait_is_longer_and_after_the_last_the_error_stands(error):
    assert [pause(error, failures) for failures in range(1, len(WAITS) + 1)] == list(WAITS) == sorted(WAITS)
    with pytest.raises(type(error)):
        pause(error, len(WAITS) + 1)


@pytest.mark.parametrize("error", [answer(429, retry_after="7"), answer(503, ratelimit='"api";r=0;t=7')])
def test_the_hub_says_how_long(error):
    assert pause(error, 1) == 7


@pytest.mark.parametrize("error", [answer(404), answer(401), answer(416), httpx.UnsupportedProtocol(""),
                                   answer(429, retry_after=str(LONGEST_WAIT + 1))])  # fmt: skip
def test_what_will_not_pass_soon_is_not_waited_for(error):
    with pytest.raises(type(error)):
        pause(error, 1)


def test_terms_are_told_as_the_card_says_them():
    commit = "c" * 40
    qwen = PinnedModel(commit=commit, license="other", license_name="tongyi-qianwen-research", gated=False, files={})
    assert in_words(qwen) == "licence other (tongyi-qianwen-research)"
    asked = PinnedDataset(commit=commit, license=None, gated="manual", files={})
    assert in_words(asked) == "no licence named, gated (manual)"
