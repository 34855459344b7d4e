import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from merging_core.errors import CheckpointError
from tasks.collect import collect, pin, pinned, unpin
from tasks.judges.kept import REPLIES, KeptReplies
from tasks.lineage import lineage_mermaid, lineage_text
from tasks.sources.object_storage import DOWNLOADS
from tasks.store import MANIFEST, Ref, Store
from tasks.watch.state import Seen, State, save


def put(store, kind, name, *parents, days=100):
    """An artifact made some days ago."""

    def make(out):
        (out / "content").write_text(name)

    ref = store.build(kind, {"name": name}, make, parents).ref
    path = store.home(ref) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["created"] = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    path.write_text(json.dumps(manifest))
    return ref


@pytest.fixture
def old(store):
    """base and expert -> merged -> scores, all old and made by a process that has ended; and one that nobody needs."""
    base, expert = put(store, "checkpoint", "base"), put(store, "checkpoint", "expert")
    merged = put(store, "merged", "merged", base, expert)
    scores = put(store, "scores", "scores", merged)
    alone = put(store, "merged", "alone", base)
    return {"base": base, "expert": expert, "merged": merged, "scores": scores, "alone": alone}


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """Artifacts of this process would count as in use: let the collector run in another one."""
    code = """
import json, sys
from tasks.collect import collect
from tasks.store import Store
found = collect(Store(sys.argv[1]), float(sys.argv[2]), delete=sys.argv[3] == "True")
print(json.dumps([[[ref.kind, ref.digest] for ref in found.artifacts], [str(p) for p in found.leftovers], found.kept]))
"""
    from tasks import usage

    def run(store, keep_days, *, delete, in_use=False):
        if not in_use:  # as when this process ends: the kernel closes its files
            for file in usage._open.values():
                file.close()
            usage._open.clear()
        command = [sys.executable, "-c", code, str(store.root), str(keep_days), str(delete)]
        text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
        artifacts, leftovers, kept = json.loads(text)
        return {Ref(*one) for one in artifacts}, leftovers, kept

    return run


def test_what_nothing_leads_to_goes_and_parents_of_what_stays_do_not(store, old, ended):
    recent = put(store, "report", "recent", old["scores"], days=1)
    removed, _, kept = ended(store, 30, delete=True)
    assert removed == {old["alone"]}
    assert set(store.refs()) == {recent, *old.values()} - {old["alone"]}
    assert kept == 5
    assert not list((store.root / ".removed").iterdir())


def test_a_dry_run_tells_the_same_and_removes_nothing(store, old, ended):
    before = sorted(path for path in store.root.rglob("*") if "runs" not in path.parts and "locks" not in path.parts)
    removed, _, kept = ended(store, 30, delete=False)
    assert (removed, kept) == (set(old.values()), 0)
    after = sorted(path for path in store.root.rglob("*") if "runs" not in path.parts and "locks" not in path.parts)
    assert after == before


def test_a_pinned_artifact_stays_with_all_it_was_made_from(store, old, ended):
    pin(old["merged"], store)
    assert pinned(store) == [old["merged"]]
    assert ended(store, 30, delete=True)[0] == {old["scores"], old["alone"]}
    unpin(old["merged"], store)
    assert ended(store, 30, delete=True)[0] == {old["merged"], old["base"], old["expert"]}
    assert store.refs() == []


def test_only_what_is_in_the_store_can_be_pinned(store):
    with pytest.raises(CheckpointError, match="not in the store"):
        pin(Ref("merged", "0" * 64), store)


def test_what_a_living_process_uses_stays_and_goes_when_the_process_was_killed(store, old, ended):
    code = """
import sys
from tasks.store import Store
store = Store(sys.argv[1])
assert store.find("merged", {"name": "merged"})
print("using", flush=True)
sys.stdin.read()
"""
    ended(store, 30, delete=False)  # closes what this process had in use
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == "using\n"
        assert ended(store, 30, delete=True)[0] == {old["scores"], old["alone"]}
        process.kill()
    assert ended(store, 30, delete=True)[0] == {old["merged"], old["base"], old["expert"]}
    assert not list((store.root / "runs").iterdir())


def test_the_files_of_a_checkpoint_used_in_place_are_never_touched(store, tmp_path, ended):
    place = tmp_path / "model"
    place.mkdir()
    (place / "weights").write_text("kept")
    store.build("checkpoint", {"in": "place"}, lambda out: {"location": str(place), "files": {"weights": {"size": 4}}})
    ended(store, 0, delete=True)
    assert store.refs() == []
    assert (place / "weights").read_text() == "kept"


@pytest.mark.parametrize("linked_later", [False, True])
def test_downloads_in_use_stay_where_the_store_is_behind_a_link(store, tmp_path, ended, linked_later):
    store.root.mkdir(parents=True, exist_ok=True)
    linked = Store(tmp_path / "link")
    linked.root.symlink_to(store.root)
    used, unused = (linked.root / DOWNLOADS / name for name in ("used", "unused"))
    for folder in (used, unused):
        folder.mkdir(parents=True)
        os.utime(folder, (0, 0))
    location = str(used if linked_later else used.resolve())
    ref = linked.build("checkpoint", {"at": "a place"}, lambda out: {"location": location}).ref
    pin(ref, linked)
    _, leftovers, _ = ended(linked, 30, delete=True)
    assert leftovers == [str(unused)]
    assert used.exists()


def test_half_done_folders_go_unless_their_maker_runs(store, ended):
    forgotten = store.root / "merged" / f".{'a' * 64}.partial"
    running = store.root / "merged" / f".{'b' * 64}.partial"
    for folder in (forgotten, running):
        folder.mkdir(parents=True)
        (folder / "shard").write_text("half")
        os.utime(folder, (0, 0))
    with store.lock(f"merged-{'b' * 64}"):
        _, leftovers, _ = ended(store, 30, delete=True)
    assert leftovers == [str(forgotten)]
    assert (forgotten.exists(), running.exists()) == (False, True)


@pytest.fixture
def replies(store):
    """Files of two judges' replies: nobody added to the first for years."""
    paths = [store.root / REPLIES / f"{name}.jsonl" for name in ("old", "new")]
    for path in paths:
        with KeptReplies(path) as kept:
            kept.add("request", "reply")
    os.utime(paths[0], (0, 0))
    return paths


def test_replies_of_judges_go_when_none_was_added_for_long(store, replies, ended):
    old, new = replies
    assert ended(store, 30, delete=False)[1] == [str(old)]
    assert collect(store, 30, delete=False).num_bytes == old.stat().st_size
    assert ended(store, 30, delete=True)[1] == [str(old)]
    assert (old.exists(), new.exists()) == (False, True)
    assert not list((store.root / ".removed").iterdir())
    with KeptReplies(new) as kept:
        assert kept["request"] == "reply"


def test_replies_that_a_living_process_works_with_stay(store, replies, ended):
    with KeptReplies(replies[0]) as kept:
        assert ended(store, 30, delete=True, in_use=True)[1] == []
        kept.add("other", "reply")
    with KeptReplies(replies[0]) as kept:
        assert "other" in kept


def test_an_artifact_with_a_damaged_record_is_left_for_verify(store, old, ended):
    (store.home(old["alone"]) / MANIFEST).write_text("{")
    assert old["alone"] not in ended(store, 30, delete=True)[0]
    assert store.home(old["alone"]).exists()


def test_this_process_keeps_what_it_made(store):
    made = put(store, "merged", "made")
    assert collect(store, 30, delete=True).artifacts == ()
    assert store.refs() == [made]


def test_lineage_walks_to_the_sources_and_tells_each_once(store, old):
    lines = lineage_text(old["scores"], store).splitlines()
    indent = {line.split()[0]: len(line) - len(line.lstrip()) for line in lines}
    assert indent == {str(old["scores"]): 0, str(old["merged"]): 2, str(old["base"]): 4, str(old["expert"]): 4}
    chart = lineage_mermaid(old["scores"], store).splitlines()
    assert chart[0] == "flowchart LR"
    assert sum("-->" in line for line in chart) == 3
    assert sum("<br/>" in line for line in chart) == 4


def test_lineage_says_where_a_parent_is_gone(store, old):
    (store.home(old["base"]) / MANIFEST).unlink()
    assert f"{old['base']}  no longer in the store" in lineage_text(old["merged"], store)


def test_looking_for_an_artifact_creates_no_store(tmp_path):
    assert Store(tmp_path / "none").find("merged", {"name": "x"}) is None
    assert not (tmp_path / "none").exists()


def test_scores_that_a_watch_accepted_stay_and_pins_are_a_persons_own(store, old, ended):
    line = {"time": "", "watched": "tuned", "place": "a", "origin": "", "verdict": "first"}
    state = State("nightly", accepted={"tuned": "a" * 64})
    state.history.append(Seen(**line, digest="a" * 64, refs=[old["scores"].digest]))
    save(state, store)
    pin(old["alone"], store)
    assert ended(store, 30, delete=False)[0] == set()
    state.accepted["tuned"] = "b" * 64
    save(state, store)
    assert ended(store, 30, delete=False)[0] == {old["expert"], old["merged"], old["scores"]}
    assert pinned(store) == [old["alone"]]


def test_nothing_is_removed_where_it_is_not_known_what_a_watch_needs(store, old):
    save(State("nightly"), store)
    (store.root / "watches" / "nightly" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        collect(store, 0, delete=True)
    assert set(store.refs()) == set(old.values())
