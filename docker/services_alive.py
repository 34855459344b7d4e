"""Exit with 0 if Prefect's background services are at work: services_alive.py SECONDS

Each of their readers of the events has nothing left to read, or asked for more in the last so many seconds.
"""

import os
import sys

import redis

READERS = ("event-persister", "reactive-triggers", "task-run-recorder")
STREAM = "events"

seconds = float(sys.argv[1])
silent = []
with redis.Redis.from_url(os.environ["PREFECT_REDIS_MESSAGING_URL"], decode_responses=True) as queue:
    groups = {group["name"]: group for group in queue.xinfo_groups(STREAM)} if queue.exists(STREAM) else {}
    for reader in READERS:
        if group := groups.get(reader):
            is_behind = group["lag"] != 0 or group["pending"] > 0
            idle_ms = min((one["idle"] for one in queue.xinfo_consumers(STREAM, reader)), default=float("inf"))
            if not is_behind or idle_ms <= 1000 * seconds:
                continue
        silent.append(reader)
if silent:
    sys.exit(f"silent for {seconds:g} s: {', '.join(silent)}")
