"""Exit with 0 if Prefect's background services are at work: services_alive.py SECONDS

Each of their readers of the events has nothing left to read, or asked for more in the last so many seconds.
"""

import os
import sys

import redis

READERS = ("event-persister", "reactive-triggers", "task-run-recorder")
STREAM = "events"

seconds = float(sys.argv[1])
with redis.Redis.from_url(os.environ["PREFECT_REDIS_MESSAGING_URL"], decode_responses=True) as queue:
    groups = {group["name"]: group for group in queue.xinfo_groups(STREAM)} if queue.exists(STREAM) else {}
    silent = [
        reader
        for reader in READERS
        if reader not in groups
        or (groups[reader]["lag"] != 0 or groups[reader]["pending"])
        and all(one["idle"] > 1000 * seconds for one in queue.xinfo_consumers(STREAM, reader))
    ]
if silent:
    sys.exit(f"silent for {seconds:g} s: {', '.join(silent)}")
