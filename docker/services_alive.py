"""Exit with 0 if Prefect's background services are at work: each reader of the events asked for more a minute ago."""

import os
import sys

import redis

READERS = ("event-persister", "reactive-triggers", "task-run-recorder")
QUIET_MS = 60_000
STREAM = "events"

with redis.Redis.from_url(os.environ["PREFECT_REDIS_MESSAGING_URL"], decode_responses=True) as queue:
    there = {group["name"] for group in queue.xinfo_groups(STREAM)} if queue.exists(STREAM) else set()
    alive = {
        reader
        for reader in READERS
        if reader in there and any(one["idle"] < QUIET_MS for one in queue.xinfo_consumers(STREAM, reader))
    }
if silent := [reader for reader in READERS if reader not in alive]:
    sys.exit(f"silent for {QUIET_MS // 1000} s: {', '.join(silent)}")
