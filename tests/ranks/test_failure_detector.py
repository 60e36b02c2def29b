"""Why a rank is declared dead, hung or lost, from what one rank knows; times in seconds, written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tlx.ranks.failure_detector import is_cut_off, judge, judge_start, launcher_died, may_still_save, suspect
from tlx.ranks.state import Failure, Heartbeat, SharedState, Snapshot

OWN = Heartbeat(1, "h", 11, 0.0, step=7, stage="step")
OTHER = Heartbeat(0, "g", 10, 0.0, step=7, stage="batch")
NOW = 1000.0
FINE = Snapshot(
    OWN,
    size=2,
    patience_s=600.0,
    now_s=NOW,
    progress_s=NOW,
    stepped=True,
    heard={0: OTHER},
    heard_s={0: NOW},
    answered_s=NOW,
    listened_s=NOW,
)


def knows(*, own=None, other=None, idle_s=0.0, silent_s=0.0, **more) -> Snapshot:
    """Rank 1 of two, which suspects something for a minute already and reads all ranks."""
    known = replace(FINE, own=replace(OWN, **(own or {})), progress_s=NOW - idle_s, **more)
    if other is not None:
        known = replace(known, heard={0: replace(OTHER, **other)})
    return replace(known, heard_s={0: NOW - silent_s}, suspected_s=NOW - 60, read_all_s=NOW - 60)


def verdict(known: Snapshot) -> tuple[str, str]:
    failure = judge(known)
    return (failure.kind, failure.message.splitlines()[0]) if failure else ("fine", "")


# Who died


def test_all_is_well():
    assert judge(FINE) is None
    assert suspect(FINE) == FINE


def test_a_process_of_this_machine_that_has_ended_is_dead():
    known = knows(processes={0: "ended"})
    assert verdict(known) == ("died", "rank 0 (g, pid 10) died at step 7, in 'batch'")
    assert judge(known).mute == (0,)
    assert judge(replace(known, read_all_s=NOW)) is None  # a second is left to read who else has
    left = knows(processes={0: "ended"}, other={"state": "left"})
    assert judge(left) is None  # it had no more to do


@pytest.mark.parametrize(
    ("silent_s", "idle_s", "state", "kind"),
    [
        (46, 50, "alive", "died"),
        (44, 50, "alive", "fine"),
        (300, 10, "alive", "fine"),  # this rank makes progress, and needs everybody for it
        (6, 0, "leaving", "died"),  # a collective has failed
        (4, 0, "leaving", "fine"),
    ],
)
def test_a_rank_on_another_machine_is_lost_once_it_is_silent_and_missed(silent_s, idle_s, state, kind):
    assert verdict(knows(own={"state": state}, silent_s=silent_s, idle_s=idle_s))[0] == kind


def test_before_the_first_step_only_the_patience_counts():
    assert judge(knows(silent_s=200, idle_s=200, stepped=False)) is None
    assert verdict(knows(silent_s=601, idle_s=601, stepped=False))[0] == "died"


def second(known: Snapshot, answer: dict[int, Heartbeat] | None) -> Snapshot:
    """What is known a second later; `answer`: heartbeats from the store, None where it does not answer."""
    known = known if answer is None else known.answered(answer, None)
    return suspect(known.later(1.0))


def test_the_time_of_a_store_that_stalled_is_nobodys_silence_once_it_answers_again():
    known = replace(FINE, own=replace(OWN, state="leaving"))
    for _ in range(8):
        known = second(known, None)
        assert judge(known) is None
    for count in (0, 0, 1):  # it takes the other rank a moment, too
        known = second(known, {0: replace(OTHER, count=count)})
        assert judge(known) is None
    for _ in range(6):
        assert judge(known) is None
        known = second(known, {0: replace(OTHER, count=1)})
    assert verdict(known)[0] == "died"


def test_a_rank_that_joined_and_sent_no_heartbeat_died_while_starting():
    known = replace(knows(), heard={}, listened_s=30.0)
    assert verdict(known) == ("died", "rank 0 sent no heartbeat after joining: it died during start-up")
    assert judge(replace(known, listened_s=29.0)) is None


def test_a_store_that_stalls_after_joining_leaves_time_for_first_heartbeats():
    known = Snapshot(OWN, 3).joined(1800.0)
    for passed_s in range(40):
        answer = {0: replace(OTHER, count=passed_s)} if passed_s >= 33 else None
        known = second(known, answer)
        assert judge(known) is None
    for _ in range(25):
        known = second(known, {0: replace(OTHER, count=known.heard[0].count + 1)})
    assert verdict(known) == ("died", "rank 2 sent no heartbeat after joining: it died during start-up")
    assert judge(second(known, {2: replace(OTHER, rank=2)})) is None


def test_a_short_patience_ends_nobody_whose_first_heartbeat_is_late():
    known = replace(knows(), heard={}, listened_s=29.0, patience_s=15.0)
    assert judge(known) is None
    stuck = replace(known, own=replace(OWN, state="stuck"), progress_s=NOW - 15)
    assert verdict(stuck) == ("hangs", "rank 0 sent no heartbeat after joining")
    assert judge(stuck).mute == (0,)


def test_the_store_is_gone():
    known = knows(store_error="Broken pipe", store_refused=True, store_at="10.0.0.1:29500")
    served, agent = judge(known), judge(knows(own={"state": "leaving"}, store_error="cut", agent_serves=True))
    said = "rank 0 (g, pid 10), which serves the store of all ranks (10.0.0.1:29500), is gone (Broken pipe)"
    assert served.message.startswith(f"{said}; its last heartbeat was at step 7, in 'batch'")
    assert agent.message.startswith("the launcher's store at ")
    assert (served.kind, agent.kind) == ("store", "store")
    assert judge(replace(known, suspected_s=NOW - 2)) is None  # a clean shutdown takes less
    assert is_cut_off(known)


# Whose error it is


def test_an_error_of_one_rank_is_told_and_the_first_failure_counts():
    known = knows(other={"state": "failed", "why": "ValueError: x"})
    assert verdict(known) == ("failed", "rank 0 (g, pid 10) failed at step 7: ValueError: x")


@pytest.mark.parametrize(("state", "kind"), [("refused", "refused"), ("stopped", "failed")])
def test_what_tlx_raises_counts_only_where_this_rank_waits_for_the_other(state, kind):
    other = {"state": state, "why": "no such file"}
    assert judge(knows(other=other)) is None
    assert verdict(knows(other=other, own={"state": "leaving"})) == (
        kind,
        "rank 0 (g, pid 10) stopped at step 7: no such file",
    )
    assert judge(knows(other=other, idle_s=60, own={"stage": "finishing"})) is None


# Who hangs

STUCK = {"state": "stuck", "why": "m.py:3 in f", "collectives": 101}


@pytest.mark.parametrize("state", ["alive", "stuck"])
def test_who_has_begun_the_fewest_collectives_is_named_though_it_made_progress_last(state):
    kind, said = verdict(knows(own=STUCK, other={"collectives": 100, "state": state}))
    assert kind == "hangs"
    how = "is at step 7, in 'batch', and the others wait for it" if state == "alive" else "hangs at step 7, in 'batch'"
    assert said == f"rank 0 (g, pid 10) {how}"


def test_where_all_are_at_the_same_point_all_are_named():
    message = judge(knows(own=STUCK, other=STUCK, stacks="run/stacks")).message
    assert "rank 0 (g, pid 10) hangs at step 7, in 'batch' (m.py:3 in f)\n  rank 1 (h, pid 11) hangs" in message
    assert "all ranks are at the same point" in message
    assert "-> stacks of all ranks are in run/stacks; no progress for 600 s (raise world.timeout_minutes" in message


def test_a_suspended_rank_gives_no_heartbeat():
    kind, said = verdict(knows(own=STUCK, silent_s=30, processes={0: "suspended"}))
    assert kind == "hangs"
    assert said == (
        "rank 0 (g, pid 10) does not answer since it was at step 7, in 'batch'; its process is stopped (SIGSTOP)"
    )


def test_a_lone_rank_hangs_at_once():
    alone = Snapshot(replace(OWN, rank=0, **STUCK), patience_s=1.5)
    assert judge(alone).message.startswith("rank 0 (h, pid 11) hangs at step 7, in 'step' (m.py:3 in f)")
    assert is_cut_off(alone)


# How doubt grows


def test_all_ranks_are_read_once_something_looks_wrong():
    ended = replace(FINE, processes={0: "ended"}, suspected_s=None, read_all_s=None)
    seen = suspect(ended)
    assert (seen.suspected_s, seen.read_all_s) == (NOW, NOW)
    assert suspect(replace(seen, processes={})).read_all_s is None  # it was nothing
    assert suspect(replace(seen, failure=Failure("died", "x"))).read_all_s is None  # it is known


def test_a_large_world_is_not_read_by_all_at_once():
    """Of the death of rank 0 all hear at the same moment: eight ranks after the other ask."""
    known = replace(FINE, size=64, own=replace(OWN, rank=17, state="leaving"))
    known = replace(known, heard={0: OTHER, 18: replace(OTHER, rank=18)}, heard_s={0: NOW, 18: NOW})
    seen = suspect(known)
    assert (seen.suspected_s, seen.read_all_s) == (NOW, None)
    assert suspect(replace(seen, now_s=NOW + 1)).read_all_s == NOW + 1


def test_a_heartbeat_that_stands_still_ages_and_a_new_one_does_not():
    known = FINE
    for _ in range(10):
        known = second(known, {0: OTHER})
    assert known.listened_s - known.heard_s[0] == 10
    known = second(known, {0: replace(OTHER, count=1)})
    assert known.listened_s - known.heard_s[0] == 0


def test_progress_is_seen_by_whoever_looks_though_the_main_thread_asks_for_no_lock():
    state = SharedState(replace(FINE, stepped=False, progress_s=0.0))
    state.beat("step", 8)
    state.beat("batch", None)
    known = state.read()
    assert (known.own.stage, known.own.step, known.stepped, known.progress_s) == ("batch", 8, True, NOW + 1)
    later = state.change(lambda now: now.later(5.0))
    assert later.idle_s == 4
    state.beat("batch", None)  # the same stage again
    assert state.change(lambda now: now.later(1.0)).idle_s == 0


# Before ranks have joined, and above them


@pytest.mark.parametrize(
    ("seen", "kind", "said"),
    [
        ({}, None, ""),
        ({"ended": {1: 5}, "noticed_s": 1.0}, None, ""),  # it may have a reason to tell
        ({"ended": {1: 5}}, "died", "rank 1 (h, pid 5) died during start-up"),
        ({"ended": {1: 5}, "verdict": {"status": "user-error", "message": "why"}}, "refused", "why"),
        ({"verdict": {"status": "fault", "message": "torchrun ended"}}, "failed", "torchrun ended"),
        ({"terminated": True}, "asked", "stopped by SIGTERM before all ranks had joined"),
        ({"unknown": [5], "unknown_s": 29.0}, None, ""),
        ({"unknown": [5], "unknown_s": 30.0}, "died", "not all ranks joined, and process 5 on h"),
    ],
)
def test_what_ends_the_waiting_for_others(seen, kind, said):
    default = {"ended": {}, "unknown": [], "verdict": {}, "terminated": False, "noticed_s": 2.0, "unknown_s": 0.0}
    failure = judge_start("h", **{**default, **seen})
    assert (failure.kind if failure else None) == kind
    assert failure is None or failure.message.startswith(said)


def test_a_launcher_that_died_leaves_time_for_a_checkpoint():
    assert launcher_died(OWN, 5).message.startswith("the launcher of rank 1 (process 5 on h) has died, at step 7")
    assert may_still_save(OWN, 39.0)
    assert not may_still_save(OWN, 40.0)
    assert may_still_save(replace(OWN, stage="finishing"), 400.0)
