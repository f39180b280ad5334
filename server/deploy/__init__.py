"""Several replicas of the server."""

import os

# Ray reads these as it is imported or started. Nothing is sent to anyone unless the operator wants it, and no log line
# is left out because it resembles another.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Where cores are shared a proxy takes minutes to start, and Ray would end it after three times 5 seconds.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "600")
