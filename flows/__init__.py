"""What runs when: the flow, its deployment and the command line."""

import tasks  # noqa: F401 - its import switches telemetry off
