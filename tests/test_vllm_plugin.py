"""What operators and requests may say to the vLLM plugin; tests/serve has the rest."""

from types import SimpleNamespace

import pytest

from mogu_kernels.vllm_plugin.settings import THROUGHOUT, Settings, requested_tokens


def engine(additional):
    return SimpleNamespace(additional_config=additional)


def test_settings():
    assert Settings.of(engine({})) is None
    assert Settings.of(engine({"mogu": None})) is None
    assert Settings.of(engine({"mogu": "dir"})) == Settings("dir")
    locked = {"checkpoint": "dir", "locked": True}
    assert Settings.of(engine({"mogu": locked, "other": 1})) == Settings("dir", locked=True)
    again = Settings.of(engine({"mogu": locked})).to_dict()
    assert Settings.of(engine({"mogu": again})) == Settings("dir", locked=True)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (3, TypeError, 'additional config "mogu" is 3: take the checkpoint\'s folder'),
        ({}, TypeError, "take the checkpoint's folder"),
        ({"checkpoint": 1}, TypeError, "take the checkpoint's folder"),
        ({"checkpoint": "dir", "lock": True}, ValueError, "has lock: take checkpoint and locked"),
        ({"checkpoint": "dir", "locked": "yes"}, TypeError, "\"locked\" is 'yes': take true"),
    ],
)
def test_wrong_settings(values, error, message):
    with pytest.raises(error) as raised:
        Settings.of(engine({"mogu": values}))
    assert message in str(raised.value)


def test_what_a_request_asks_for():
    assert requested_tokens(None) is None
    assert requested_tokens({"kv_transfer_params": {}}) is None
    assert requested_tokens({"mogu_routed_tokens": 0}) == 0
    assert requested_tokens({"mogu_routed_tokens": 7}) == 7
    assert requested_tokens({"mogu_routed_tokens": "all"}, locked=True) == THROUGHOUT


@pytest.mark.parametrize("value", [-1, True, 2.0, "5", None, [5], THROUGHOUT])
def test_what_it_may_not(value):
    with pytest.raises(ValueError, match="take a number of answer tokens"):
        requested_tokens({"mogu_routed_tokens": value})
    with pytest.raises(ValueError, match="unknown argument mogu_tokens"):
        requested_tokens({"mogu_tokens": value})


@pytest.mark.parametrize("value", [0, 5, 100])
def test_a_lock_leaves_the_checkpoint_or_more(value):
    with pytest.raises(ValueError, match="locked by the operator"):
        requested_tokens({"mogu_routed_tokens": value}, locked=True)
    locked, free = (Settings("demo/checkpoint", locked=own) for own in (True, False))
    asked = {"mogu_routed_tokens": value}
    assert locked.routed_tokens(asked) == locked.routed_tokens(None) == 5
    assert free.routed_tokens(asked) == value
    assert locked.routed_tokens({"mogu_routed_tokens": "all"}) == THROUGHOUT
