"""runbooks/limits.md: its figures are the code's, its names exist, its commands work."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from app import redis_pipe
from app.config import Quota, WrittenAway
from app.limits import Limits, budgets, room, scopes
from app.reports import spent
from tests.journey import Journey
from tests.limits_parts import a_config, a_key, a_tenant, pipe_to
from tests.redis_parts import AMBIENT, RedisServer
from tests.test_readme import checkout, shell

PAGE = (Path(__file__).parents[1] / "runbooks" / "limits.md").read_text()
TEXT = " ".join(PAGE.split())
__all__ = ["checkout"]


@pytest.mark.parametrize(
    "sentence",
    [
        f"at most {scopes.WINDOW_SECONDS} s",
        f"`key_concurrency`; {scopes.RETRY_CONCURRENCY_SECONDS:g} s",
        f"a lease of {scopes.LEASE_MS // 1000} s that replicas renew every {room.RENEW_SECONDS:g} s",
        "answered for 2 s; each loss within a minute of the last doubles that, up to "
        f"{redis_pipe._LONGEST_PROBATION_SECONDS:g} s",
        "after {}, {} and {} s, and once more after the longest call".format(*budgets.LATE_SECONDS),
        f"at most {spent.DEADLINE_SECONDS:g} s)",
        f"the mark `{scopes.WHOLE}`",
        "images and files count 1,024 tokens each",
        "sent then, up to 10,000;",
    ],
)
def test_figures_of_the_page_are_those_of_the_code(sentence: str) -> None:
    assert sentence in TEXT


def test_defaults_that_the_page_tells_are_those_of_the_code(tmp_path: Path) -> None:
    pipe = pipe_to(RedisServer(tmp_path))
    assert redis_pipe.RedisPipe.__init__.__kwdefaults__["probation_seconds"] == 2.0
    assert Limits.__init__.__kwdefaults__["unsettled_limit"] == 10_000
    assert (redis_pipe._STEADY_SECONDS, budgets.CHECK_SECONDS) == (60.0, 1.0)
    assert Limits(pipe, AMBIENT).budgets.whole


def test_every_limit_stands_in_the_table_with_the_name_that_refusals_have() -> None:
    everything = {name: 1 for name in Quota.__struct_fields__ if name != "time_zone"}
    scope = scopes.make_scope(
        a_config(shared=Quota(rpm=1, tpm=1)),
        a_tenant(**everything),
        a_key(**everything),
        AMBIENT.now(),
        scopes.Scripts(b"", b""),
    )
    named = set(re.findall(r"`((?:tenant|key|global)_[a-z_]+)`", PAGE.partition("## How far")[0]))
    assert named == {limit.name for limit in scope.limits}


def test_every_policy_of_the_configuration_is_on_the_page() -> None:
    (policies,) = {field.type for field in msgspec.structs.fields(WrittenAway)}
    assert all(f"`{policy}`" in PAGE for policy in policies.__args__)


def test_commands_of_the_page_work_when_pasted(checkout: Path) -> None:
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    ran = shell(commands, checkout)
    assert ran.returncode == 0, ran.stderr
    assert "gateway_limits_budgets_whole 1.0" in ran.stdout


def test_metrics_of_the_page_are_scraped(journey: Journey) -> None:
    scraped = journey.admin("/metrics").text
    named = set(re.findall(r"`(gateway_(?:limits|dependency|ratelimit)_[a-z_]+)", PAGE))
    assert len(named) == 6
    assert [name for name in named if f"# TYPE {name} " not in scraped] == []
