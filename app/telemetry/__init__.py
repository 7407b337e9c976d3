"""What is seen of a call: `Telemetry` is the room; its parts are lines, figures, traces."""

from app.telemetry.lines import JsonLog, Lines
from app.telemetry.room import MAX_TENANTS, States, Telemetry
from app.telemetry.traces import open_spans

__all__ = ["MAX_TENANTS", "JsonLog", "Lines", "States", "Telemetry", "open_spans"]
